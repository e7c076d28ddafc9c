"""The TRL engine refuses what would go round the clip, warns when no clip can act, and stops at NaN and infinity."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_support import digits, make_model, make_tokenizer, make_trainer, prompts

import bandpo
import bandpo.engines.trl as engine
from bandpo._input import InputError
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer, NonFiniteError, check_seam


class Opposed:
    """A clip of which nothing is known but c."""

    def coefficient(self, tokens):
        return tokens.weighted * (1 - tokens.rise)


class Rollout(Opposed):
    needs = ("rollout_logps",)


OPPOSED, ROLLOUT = Opposed(), Rollout()
VLLM = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
REFUSALS = [
    ({"loss_type": "sapo"}, ["loss_type='sapo'", "clip='sapo' and loss_type='grpo'", "clip='host'"]),
    ({"loss_type": "cispo"}, ["loss_type='cispo'", "clip='cispo' and loss_type='dapo'", "clip='host'"]),
    ({"loss_type": "vespo"}, ["loss_type='vespo'", "clip='host'"]),
    ({"loss_type": "dr-grpo"}, ["did you mean 'dr_grpo'"]),
    ({"importance_sampling_level": "sequence"}, ["importance_sampling_level='sequence'", "clip='gspo'"]),
    ({"clip": "gspo", "importance_sampling_level": "sequence"}, ["must be 'token'"]),
    ({"epsilon": 0.1}, ["epsilon=0.1", "clip='fixed'", "eps_low"]),
    ({"epsilon_high": 0.28}, ["epsilon_high=0.28", "eps_high"]),
    ({"delta": 0.05}, ["delta=0.05", "above 1", "clip_args={'delta': 0.05}"]),
    ({"clip": "sapo", "delta": 4.0}, ["delta=4.0 with clip='sapo'", "dual_clip"]),
    ({"clip": "host", "delta": 0.5}, ["delta=0.5"]),
    ({"clip": "host", "clip_args": {"delta": 0.05}}, ["clip='host'"]),
    ({"clip": "gspo", "top_entropy_quantile": 0.8}, ["top_entropy_quantile=0.8 with clip='gspo'", "single tokens"]),
    ({"clip": "gspo", "use_bias_correction_kl": True, "beta": 0.1}, ["use_bias_correction_kl=True with clip='gspo'"]),
    ({"clip": "gspo", **VLLM}, ["vllm_importance_sampling_mode='token_truncate'", "'sequence_mask'"]),
    ({"clip": "bend"}, ["bend", "did you mean 'band'"]),
    ({"clip": "sides", "clip_args": {"low": {"clip": "fixd"}}}, ["did you mean 'fixed'"]),
    ({"clip_args": {"delt": 0.1}}, ["delt", "did you mean 'delta'"]),
    ({"clip_args": {"delta": 0.0}}, ["delta=0"]),
    ({"clip_args": "delta"}, ["clip_args='delta'", "dict"]),
    ({"clip": 3}, ["clip=3", "must be a name"]),
    (
        {"clip_args": {"divergence": bandpo.Divergence("x", lambda u: (u - 1) ** 2)}},
        ["cannot be saved", "file.py:name"],
    ),
    ({"clip_metrics": "breif"}, ["clip_metrics='breif'", "did you mean 'brief'"]),
    ({"clip": OPPOSED, "off_policy_mask_threshold": 0.1}, ["off_policy_mask_threshold=0.1", "sign of A"]),
    ({"clip": ROLLOUT}, ["needs rollout_logps", "TRL without vLLM"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSALS)
def test_config_refuses_in_one_line(tmp_path, options, words):
    with pytest.raises(InputError) as caught:
        BandGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


def test_config_comes_from_a_command_line_and_keeps_trl_fields(tmp_path):
    line = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "False",
        "--delta",
        "4",
        "--clip_args",
        '{"delta": 0.1}',
    ]
    (config,) = HfArgumentParser(BandGRPOConfig).parse_args_into_dataclasses(line)
    assert config.clip_args == {"delta": 0.1} and (config.clip, config.delta) == ("band", 4.0)
    assert config.logging_nan_inf_filter is False


def test_liger_is_refused_where_it_has_its_own_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda self: None, raising=False)
    with pytest.raises(InputError, match="use_liger_kernel=True"):
        BandGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, use_liger_kernel=True)


def test_trainer_refuses_plain_config_and_late_changes(tmp_path):
    arguments: dict[str, Any] = {"reward_funcs": digits, "train_dataset": prompts()}
    arguments["processing_class"] = make_tokenizer()
    with pytest.raises(InputError, match="args=GRPOConfig"):
        BandGRPOTrainer(make_model(), args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), **arguments)
    config = BandGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    config.loss_type = "sapo"
    with pytest.raises(InputError, match="loss_type='sapo'"):
        BandGRPOTrainer(make_model(), args=config, **arguments)


UNSLOTH = """
import transformers, trl

class UnslothGRPOTrainer(transformers.Trainer):
    def compute_loss(self, *args, **named):
        raise AssertionError

trl.GRPOTrainer = UnslothGRPOTrainer
from bandpo.engines.trl import BandGRPOTrainer, check_seam

for call in (lambda: BandGRPOTrainer("x"), check_seam):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_unsloths_trainer_in_the_place_of_trls_is_refused():
    """`import unsloth` binds trl.GRPOTrainer to a class that has a loss of its own and no `_compute_loss`."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", UNSLOTH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, seam = done.stdout.splitlines()
    assert made == "GRPOTrainer is Unsloth's, whose loss goes round the clip: must be TRL's; drop unsloth"
    assert "UnslothGRPOTrainer has no _compute_loss any more" in seam


def test_seam_fits_and_a_moved_or_old_one_is_named(monkeypatch):
    check_seam()
    with monkeypatch.context() as patch:
        patch.setattr(engine.trl, "__version__", "0.29.1")
        with pytest.raises(InputError, match=r"trl==0\.29\.1.*at least 1\.10"):
            check_seam()
    with monkeypatch.context() as patch:
        patch.setattr(engine.transformers, "__version__", "5.2.0")
        with pytest.raises(InputError, match=r"transformers==5\.2\.0"):
            check_seam()

    def moved(self, model, inputs):
        return None

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", moved)
    with pytest.raises(InputError, match=r"no longer holds.*must be trl>=1\.10, .*1\.16\.0: pip install '\.\[trl\]'"):
        check_seam()


def test_a_loss_that_does_not_use_the_bounds_is_caught(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)

    def around(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        logps, *_ = self._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 1)
        return logps.mean()

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", around)
    with pytest.raises(InputError, match="went round the clip"):
        trainer.train()
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.2)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: 2 - self.epsilon_low)
    with pytest.raises(InputError, match="epsilon in a new way"):
        trainer.train()
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.2)


@pytest.mark.parametrize("schedule", [(1, 2, 2), (1, 1, 2), (2, 1, 2)])
def test_warns_when_every_ratio_is_one(tmp_path, schedule):
    names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")
    with pytest.warns(UserWarning, match="no clip can act; set steps_per_generation=8 .* num_iterations=2"):
        make_trainer(tmp_path, **dict(zip(names, schedule, strict=True)))


class Poison(TrainerCallback):
    """Puts a NaN into a weight after the second step."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            model.lm_head.weight.data[0, 0] = float("nan")


def train_until_stopped(trainer: Any) -> str:
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stops_at_nan_logps(tmp_path):
    message = train_until_stopped(make_trainer(tmp_path, callbacks=[Poison()]))
    assert message.startswith("step 3: ") and "of" in message and "logps are not finite" in message


def test_stops_at_infinite_loss_and_gradient_before_the_weights_change(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "gradient", max_grad_norm=0.0)
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    message = train_until_stopped(trainer)
    assert message.startswith("step 1: the gradient") and "learning_rate" in message
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))

    score = GRPOTrainer._generate_and_score_completions

    def far_off(self, batch):
        result = score(self, batch)
        result["old_per_token_logps"] = result["old_per_token_logps"] - 200
        return result

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", far_off)
    message = train_until_stopped(make_trainer(tmp_path / "loss"))
    assert message.startswith("step 1: the loss is") and "delta=10" in message
