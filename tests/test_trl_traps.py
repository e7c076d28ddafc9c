"""TRL's own traps, as the guide describes them: what each does to the ratio, the clip or the advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_trl import own_logps
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig
from trl_support import make_model, make_tokenizer, make_trainer, model_config, prompts

from bandpo import Band
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer, NonFiniteError

Tensor = torch.Tensor


class Seeing(BandGRPOTrainer):
    """Keeps what reaches each training micro-batch."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        full = own_logps(self, inputs).detach()
        loss = super()._compute_loss(model, inputs)
        mask, old = inputs["completion_mask"].bool(), inputs["old_per_token_logps"]
        seen = {"advantages": inputs["advantages"], "ratio": (self._logps - old)[mask].exp(), "old": old[mask]}
        self.__dict__.setdefault("seen", []).append(seen | {"full": full[mask]})
        return loss


def rewards_of(*values: float | None) -> Any:
    """A reward function that gives each group of four these."""
    return lambda completions, **_: [values[i % 4] for i in range(len(completions))]


def not_finite(trainer: Any) -> set[float]:
    return {entry[name] for entry in trainer.state.log_history if (name := "rewards/not_finite") in entry}


@pytest.mark.parametrize(
    ("values", "zero"),
    [((1.0, 0.0, math.nan, 5.0), 1), ((1.0, 0.0, None, 5.0), 1), ((1.0, math.inf, 0.0, 5.0), 4)],
)
@pytest.mark.filterwarnings("ignore:.*All reward functions")
def test_rewards_that_trl_zeroes_are_counted_and_said_once(tmp_path, values, zero):
    trainer = make_trainer(tmp_path, Seeing, reward_funcs=rewards_of(*values), max_steps=8, shuffle_dataset=False)
    with pytest.warns(UserWarning, match=r"of 16 completions have an infinite one, or none but NaN") as told:
        trainer.train()
    assert sum("rewards/not_finite" in str(w.message) for w in told) == 1
    assert not_finite(trainer) == {0.25}
    advantages = torch.cat([s["advantages"] for s in trainer.seen])
    assert float((advantages == 0).float().mean()) == zero / 4


def test_finite_rewards_and_one_silent_function_are_no_fault(tmp_path):
    funcs = [rewards_of(1.0, 0.0, 0.5, 2.0), rewards_of(None, 1.0, 0.0, None)]
    trainer = make_trainer(tmp_path, Seeing, reward_funcs=funcs, max_steps=4)
    trainer.train()  # a warning would be an error
    assert not_finite(trainer) == {0.0}


def test_nan_by_one_of_two_functions_adds_nothing(tmp_path):
    seen = []
    for silent in (math.nan, 0.0):
        funcs = [rewards_of(1.0, 0.0, 0.5, 2.0), rewards_of(silent, 1.0, 0.0, silent)]
        trainer = make_trainer(tmp_path / str(silent), Seeing, reward_funcs=funcs, max_steps=1)
        trainer.train()
        seen.append(trainer.seen[0]["advantages"])
    torch.testing.assert_close(*seen)


def test_scaled_by_batch_one_infinite_reward_zeroes_every_advantage(tmp_path):
    once = lambda completions, **_: [math.inf] + [float(i % 3) for i in range(1, len(completions))]  # noqa: E731
    trainer = make_trainer(tmp_path, Seeing, reward_funcs=once, scale_rewards="batch", max_steps=4)
    with pytest.warns(UserWarning, match="1 of 16 completions"):
        trainer.train()
    assert not any(s["advantages"].any() for s in trainer.seen[:8])


def test_an_infinite_reward_without_scaling_stops_the_run(tmp_path):
    """TRL turns the group's -inf into the largest float; the guard stops what that does."""
    trainer = make_trainer(tmp_path, reward_funcs=rewards_of(1.0, math.inf, 0.0, 2.0), scale_rewards="none")
    with pytest.warns(UserWarning, match="infinite"), pytest.raises(NonFiniteError):
        trainer.train()


def test_top_k_and_temperature_the_ratio_is_of_the_whole_tempered_policy(tmp_path):
    trainer = make_trainer(tmp_path, Seeing, top_k=3, temperature=0.7, max_steps=4)
    trainer.train()
    first = trainer.seen[0]
    torch.testing.assert_close(first["old"], first["full"], atol=1e-5, rtol=0)
    assert float((first["ratio"] - 1).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # TRL calls what transformers has renamed
def test_gradient_checkpointing_changes_neither_weights_nor_metrics(tmp_path):
    runs = []
    for on in (False, True):  # a trainer sets the seed when it is made
        runs.append(make_trainer(tmp_path / str(on), gradient_checkpointing=on, clip_args={"delta": 0.02}))
        runs[-1].train()
    for one, other in zip(*(t.model.parameters() for t in runs), strict=True):
        torch.testing.assert_close(one, other)
    first, second = ([e["clip/zero_grad"] for e in t.state.log_history if "loss" in e] for t in runs)
    assert first == pytest.approx(second) and max(first) > 0


def test_sync_ref_model_leaves_the_denominator_alone(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(
        tmp_path / "run", Seeing, model=str(tmp_path / "model"), beta=0.1, sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, max_steps=8, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer.train()
    moved = [float((s["ratio"] - 1).abs().max()) for s in trainer.seen]
    assert max(moved[:2] + moved[8:10]) < 1e-5 < 1e-3 < max(moved[2:8])  # two micro-batches an update, eight a rollout


@pytest.mark.parametrize(("dropout", "off", "noisy"), [(0.2, False, True), (0.2, True, True), (0.0, False, False)])
def test_attention_dropout_moves_the_ratio_before_any_update(tmp_path, dropout, off, noisy):
    """TRL's `disable_dropout` reaches modules, not the attention's own."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(model_config(initializer_range=0.2, attention_dropout=dropout))
    trainer = make_trainer(tmp_path, Seeing, model=model, max_steps=1, disable_dropout=off)
    trainer.train()
    assert (float((trainer.seen[0]["ratio"] - 1).abs().max()) > 0.1) == noisy


@dataclass
class OpenR1Config(GRPOConfig):
    """The shape of open-r1's configuration: TRL's, with fields of its own and no `__post_init__`."""

    benchmarks: list[str] = field(default_factory=list)
    system_prompt: str | None = None


@dataclass
class Joined(OpenR1Config, BandGRPOConfig):
    pass


def test_a_configuration_that_extends_trl_s_is_joined_with_ours(tmp_path):
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "num_iterations": 2}
    config = Joined(str(tmp_path), clip="band", clip_args='{"delta": 0.02}', system_prompt="Think.", **options)
    assert config.clip_args == {"delta": 0.02} and config.system_prompt == "Think."
    trainer = BandGRPOTrainer(
        make_model(),
        lambda completions, **_: [0.0] * len(completions),
        config,
        prompts(),
        processing_class=make_tokenizer(),
    )
    assert trainer.clip == Band(delta=0.02)
    with pytest.raises(ValueError, match="loss_type='cispo'"):
        Joined(str(tmp_path), loss_type="cispo", **options)
