"""Every kind of clip through TRL: equal to TRL's own where TRL has it, else to the clip's own formula; and `host`."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl_support import make_trainer

import bandpo
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer, clip_of

Tensor = torch.Tensor


class Twin(BandGRPOTrainer):
    """Compares every micro-batch's gradient with that of TRL's own loss under other settings."""

    host: dict[str, Any]

    def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **named)
        self.seen.append(result[0])
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.seen: list[Tensor] = []
        mine = {name: getattr(self, name) for name in self.host}
        args, self.args = self.args, copy.copy(self.args)
        for name, value in self.host.items():
            setattr(self, name, value)
        self.args.delta = self.host.get("delta")
        want = GRPOTrainer._compute_loss(self, model, inputs)
        for name, value in mine.items():
            setattr(self, name, value)
        self.args = args
        loss = super()._compute_loss(model, inputs)
        own, got = (
            torch.autograd.grad(x, y, retain_graph=True)[0] for x, y in zip((want, loss), self.seen, strict=True)
        )
        self.errors.append(float((got - own).abs().max() / own.abs().max()))
        return loss

    delta, seen = None, []


def sequence(low: float, high: float) -> dict[str, Any]:
    return {"importance_sampling_level": "sequence", "epsilon_low": low, "epsilon_high": high}


OWN: list[tuple[str, dict[str, Any] | None, str, dict[str, Any]]] = [
    ("sapo", None, "grpo", {"loss_type": "sapo"}),
    ("cispo", None, "dapo", {"loss_type": "cispo", "epsilon_high": 1.28}),
    ("cispo", {"eps_high": 0.05}, "dapo", {"loss_type": "cispo", "epsilon_high": 1.05}),
    ("dual_clip", {"cap": 1.25}, "dapo", {"delta": 1.25}),
    *[("gspo", {"eps_low": 0.02, "eps_high": 0.03}, loss, sequence(0.02, 0.03)) for loss in ("grpo", "bnpo", "dapo")],
    ("gspo", None, "dr_grpo", sequence(3e-4, 4e-4)),
    ("vespo", None, "dapo", {"loss_type": "vespo"}),
    ("gspo", {"eps_low": 2e-3, "eps_high": 2.5e-3}, "luspo", sequence(2e-3, 2.5e-3)),
]


@pytest.mark.parametrize(("clip", "clip_args", "loss_type", "host"), OWN)
def test_the_gradient_is_that_of_trls_own_loss(tmp_path, clip, clip_args, loss_type, host):
    # at large ratios TRL's own sapo has lost its digits: it computes 1 - sigmoid in float32
    rate = 0.002 if clip == "sapo" else 0.01
    trainer = make_trainer(
        tmp_path, Twin, clip=clip, clip_args=clip_args, loss_type=loss_type, max_steps=4, learning_rate=rate
    )
    trainer.host, trainer.errors = host, []
    trainer.train()
    assert len(trainer.errors) == 8 and max(trainer.errors) < 1e-6
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert min(entry["clip/gradient_kept"] for entry in steps) < 0.999, "the clip never acted"


class Formula(BandGRPOTrainer):
    """Compares every micro-batch's gradient with c by the clip itself, carried through the log-probabilities."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        weights, mask = list(self.model.parameters()), inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], mask], 1)
        logps, entropies = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.size(1), compute_entropy=True
        )[:2]
        t = bandpo.Tokens(
            logps, inputs["old_per_token_logps"], inputs["advantages"], mask,
            rollout_logps=inputs.get("sampling_per_token_logps"), entropies=entropies,
        )  # fmt: skip
        c = bandpo.get_clip(self.clip).coefficient(t)
        want = -((c * logps * mask).sum(1) / mask.sum(1)).mean() / self.current_gradient_accumulation_steps
        got, own = (
            torch.cat([g.flatten() for g in torch.autograd.grad(x, weights, retain_graph=True)]) for x in (loss, want)
        )
        self.errors.append(float((got - own).norm() / own.norm()))
        self.seen |= bool((t.log_r.abs() > 20).any())
        return loss


REFUSED = {"dppo_topk": "state_divergence", "topr": "rewards"}  # the clip, and what TRL does not hand over


@pytest.mark.parametrize("clip", REFUSED)
def test_what_trl_cannot_carry_is_refused_by_name(tmp_path, clip):
    with pytest.raises(bandpo.InputError, match=f"clip='{clip}': needs {REFUSED[clip]}, which TRL"):
        make_trainer(tmp_path, clip=clip)


@pytest.mark.filterwarnings("ignore:num_iterations=1")
@pytest.mark.parametrize("clip", [clip for clip in bandpo.list_clips() if clip not in REFUSED])
def test_every_clip_trains_by_its_coefficient(tmp_path, clip):
    trainer = make_trainer(tmp_path, Formula, clip=clip, loss_type="grpo", max_steps=4, learning_rate=0.02)
    trainer.errors, trainer.seen = [], False
    trainer.train()
    assert len(trainer.errors) == 8 and max(trainer.errors) < 2e-6
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert len([key for key in entry if key.startswith("clip/")]) < 10
    hard = trainer.clip.as_bounds
    assert any(key.startswith("clip_ratio/") for key in entry) == hard, "TRL's own clip metrics are true, or gone"


def test_ratios_past_e_20_keep_their_coefficient(tmp_path, monkeypatch):
    """There the host is handed old log-probabilities that are nearer, after c was computed from the true ones."""
    score = GRPOTrainer._generate_and_score_completions

    def far_off(self, batch):
        result = score(self, batch)
        old = result["old_per_token_logps"]
        result["old_per_token_logps"] = torch.where(torch.arange(old.size(1)) % 2 == 0, old - 30, old)
        return result

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", far_off)
    trainer = make_trainer(tmp_path, Formula, clip="cispo", loss_type="grpo", max_steps=2)
    trainer.errors, trainer.seen = [], False
    trainer.train()
    assert trainer.seen and max(trainer.errors) < 2e-6


HOSTS = [
    ({"loss_type": "sapo"}, bandpo.get_clip("sapo")),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, bandpo.get_clip("cispo", eps_high=4.0)),
    ({"loss_type": "cispo"}, bandpo.get_clip("cispo", eps_high=-0.8)),  # TRL's own default cuts every ratio to 0.2
    ({"epsilon_high": 0.28}, bandpo.Fixed(0.2, 0.28)),
    ({"delta": 3.0}, bandpo.get_clip("dual_clip", cap=3.0)),
    ({"delta": 1.1}, bandpo.get_clip("dual_clip", eps_high=1.1 - 1, cap=1.2)),
    ({"importance_sampling_level": "sequence", "epsilon": 3e-4}, bandpo.get_clip("gspo", eps_high=3e-4)),
    ({"loss_type": "vespo"}, bandpo.get_clip("vespo")),
    ({"epsilon": 2.0, "epsilon_high": 0.2}, bandpo.Fixed(1.0, 0.2)),  # no bound below
]


@pytest.mark.parametrize(("options", "clip"), HOSTS)
def test_host_changes_nothing_and_measures(tmp_path, options, clip):
    ours = make_trainer(tmp_path / "a", clip="host", max_steps=4, **options)
    ours.train()
    theirs = make_trainer(tmp_path / "b", GRPOTrainer, max_steps=4, **options)
    theirs.train()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert ours.clip == clip == clip_of(theirs.args)
    for got, want in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        logged = {
            key: value for key, value in got.items() if not key.startswith("clip/") and key != "rewards/not_finite"
        }
        assert logged.keys() == want.keys()
        assert all(logged[k] == want[k] for k in want if k.startswith(("clip_ratio", "loss", "reward", "cispo")))
        assert any(key.startswith("clip/") for key in got) == ("loss" in got)


def test_a_loss_that_the_registry_has_not_is_none(tmp_path):
    args = make_trainer(tmp_path, GRPOTrainer, loss_type="vespo").args
    args.use_vllm = True  # then TRL multiplies W by its importance correction
    assert clip_of(args) is None
    sequence = {"importance_sampling_level": "sequence"}
    for own in (sequence | {"loss_type": "sapo"}, sequence | {"loss_type": "cispo"}, sequence | {"delta": 3.0},
                {"epsilon_high": -0.1}, {"loss_type": "cispo", "epsilon_high": -1.0}):  # fmt: skip
        with pytest.warns(UserWarning, match="is none of the registry's"):
            trainer = make_trainer(tmp_path, clip="host", max_steps=2, **own)
        assert trainer.clip is None
    trainer.train()
    assert not any(key.startswith("clip/") for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("anchor", ["p", "r", "both"])
def test_the_sampling_engines_policy_can_be_the_anchor(tmp_path, monkeypatch, anchor):
    score = GRPOTrainer._generate_and_score_completions

    def sampled_by_another(self, batch):
        result = score(self, batch)
        old = result["old_per_token_logps"]
        result["sampling_per_token_logps"] = old - 0.1 * torch.arange(old.size(1)).sin().abs()
        return result

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", sampled_by_another)
    with pytest.raises(bandpo.InputError, match="needs rollout_logps, which TRL without vLLM"):
        make_trainer(tmp_path, clip_anchor=anchor, vllm_importance_sampling_correction=False)
    trainer = make_trainer(tmp_path, Formula, loss_type="grpo", max_steps=2, learning_rate=0.02)
    trainer._clip = bandpo.clips.anchored(bandpo.Band(), anchor)  # as with vLLM, which this machine may not have
    trainer.errors, trainer.seen = [], False
    trainer.train()
    assert max(trainer.errors) < 2e-6
    if anchor != "p":
        with pytest.raises(bandpo.InputError, match="both weigh by old / rollout"):
            BandGRPOConfig(str(tmp_path), clip_anchor=anchor, use_vllm=True, use_cpu=True, bf16=False)


def test_a_schedule_follows_the_steps(tmp_path):
    seen = []

    class Watched(BandGRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append((self.state.global_step, self.clip))
            return loss

    schedule = {"start": 0.2, "end": 0.0, "shape": "linear"}
    trainer = make_trainer(tmp_path, Watched, clip="fixed", clip_args={"eps_low": schedule}, max_steps=4)
    trainer.train()
    assert {step: clip.eps_low for step, clip in seen} == pytest.approx({0: 0.2, 1: 0.15, 2: 0.1, 3: 0.05})
    assert {clip.eps_high for _, clip in seen} == {0.2}


def test_objects_survive_checkpoints_and_logs(tmp_path):
    args: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    own = {"divergence": bandpo.get_divergence("hellinger"), "delta": 0.1}
    trainer = make_trainer(tmp_path / "a", clip_args=own, **args)
    trainer.train()
    kept = torch.load(tmp_path / "a" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert kept.clip_args["delta"] == 0.1 and bandpo.get_clip("band", **kept.clip_args).measure.name == "hellinger"
    shown = json.loads(kept.to_json_string())
    assert shown["clip_args"] == {"divergence": "Divergence('hellinger')", "delta": 0.1} and shown["clip"] == "band"
    trainer = make_trainer(tmp_path / "b", clip=bandpo.Sides(), **args)
    trainer.train()
    kept = torch.load(tmp_path / "b" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert kept.clip == bandpo.Sides() and json.loads(kept.to_json_string())["clip"].startswith("Sides(high=Band(")


@pytest.mark.parametrize(("how_much", "keys"), [("none", 0), ("brief", 9), ("full", 260)])
def test_how_much_is_logged(tmp_path, how_much, keys):
    trainer = make_trainer(tmp_path, clip_metrics=how_much, max_steps=1)
    trainer.train()
    found = [key for key in trainer.state.log_history[0] if key.startswith("clip/")]
    assert len(found) == keys if keys < 100 else len(found) > keys


def test_a_strangers_clip_trains(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Half:\n    def coefficient(self, tokens):\n        return tokens.weighted / 2\n")
    ours = make_trainer(
        tmp_path / "a", clip=f"{file}:Half", max_steps=3, max_grad_norm=0.0, optim="sgd", learning_rate=0.2
    )
    ours.train()
    none = make_trainer(tmp_path / "b", clip="none", max_steps=3, max_grad_norm=0.0, optim="sgd", learning_rate=0.1)
    none.train()
    for one, other in zip(ours.model.parameters(), none.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert ours.state.log_history[0]["clip/gradient_kept"] == pytest.approx(0.5)


def test_the_config_takes_a_clip_from_a_command_line(tmp_path):
    from transformers import HfArgumentParser

    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--clip", "dgpo", "--clip_args"]
    (config,) = HfArgumentParser(BandGRPOConfig).parse_args_into_dataclasses([*words, '{"region": {"clip": "band"}}'])
    assert isinstance(config, GRPOConfig) and config.clip == "dgpo" and config.clip_args == {"region": {"clip": "band"}}


class Half:
    """A clip that acts at r = 1 too."""

    def coefficient(self, tokens):
        return tokens.weighted / 2


def test_a_clip_acts_where_a_rollout_feeds_one_update(tmp_path):
    seen = []

    class Seen(BandGRPOTrainer):
        def _exchange(self, inputs):
            before = inputs["advantages"].unsqueeze(1)
            super()._exchange(inputs)
            miss = (inputs["advantages"] - before / 2) * inputs["completion_mask"]
            seen.append(miss.abs().max().item())

    one = {"num_iterations": 1, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    with pytest.warns(UserWarning, match="every ratio is 1"):
        trainer = make_trainer(tmp_path, Seen, clip=Half(), max_steps=2, **one)
    trainer.train()
    assert len(seen) >= 2 and max(seen) < 1e-6
    kept = [entry["clip/gradient_kept"] for entry in trainer.state.log_history if "clip/gradient_kept" in entry]
    assert kept and kept == pytest.approx([0.5] * len(kept))


def test_trls_ceiling_beside_a_region_is_counted(tmp_path):
    from bandpo.engines._trl_config import Below

    logps, old = torch.log(torch.tensor([[0.5, 0.2]])), torch.log(torch.tensor([[0.25, 0.15]]))
    tokens = bandpo.Tokens(logps, old, torch.ones(1))
    wide = bandpo.Band(delta=0.5)
    assert (Below(wide, 1.5).coefficient(tokens) != 0).tolist() == [[False, True]]
    assert (wide.coefficient(tokens) != 0).all()


def test_trls_ceiling_takes_what_trls_formula_takes():
    from bandpo.engines._trl_config import Below, clip_of

    logps = (-0.3 + torch.linspace(-0.6, 0.29, 90)).repeat(2, 1).double()
    old, advantages = torch.full_like(logps, -0.3 - 0.29), torch.tensor([1.0, -1.0], dtype=torch.float64)
    for high, delta in ((0.5, 1.3), (0.2, 1.3), (0.5, 1.1), (0.2, 3.0)):
        x = logps.clone().requires_grad_()
        r, a = torch.exp(x - old), advantages[:, None]
        torch.minimum(r.clamp(max=delta) * a, r.clamp(0.8, 1 + high) * a).sum().backward()
        tokens = bandpo.Tokens(logps, old, advantages)
        host = clip_of(GRPOConfig(epsilon=0.2, epsilon_high=high, delta=delta, use_cpu=True, bf16=False))
        for clip in (host, Below(bandpo.Fixed(0.2, high), delta)):
            torch.testing.assert_close(clip.coefficient(tokens), x.grad)
