"""Every adapter stops, with one line that names the tested version, when the engine's seam has moved."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from typing import Any

import pytest
import torch
from cases import CASES, Tokens
from test_contract import tokens

import bandpo
from bandpo.engines import _margins

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines, at import


@pytest.mark.parametrize("name", ["torchrl_ppo", "torchrl_grpo"])
def test_a_moved_clamp_stops_torchrl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    monkeypatch.setattr(_margins.inspect, "getsource", lambda place: "a new loss")
    with pytest.raises(ValueError, match=r"torchrl==.*no longer holds `log_weight.clamp.*'torchrl==0.14.1'"):
        case.ours(tokens(), "band", None)


def test_a_moved_clamp_stops_rllib(monkeypatch: pytest.MonkeyPatch) -> None:
    CASES["rllib"]()
    from bandpo.engines.rllib import BandPPOTorchLearner

    monkeypatch.setattr(_margins.inspect, "getsource", lambda place: "a new loss")
    with pytest.raises(ValueError, match=r"ray==.*no longer holds `torch.clamp.*pip install 'ray\[rllib\]==2.60.0'"):
        BandPPOTorchLearner.build(object.__new__(BandPPOTorchLearner))


@pytest.mark.parametrize("name", ["skyrl", "slime"])
def test_a_moved_clamp_stops_at_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[name]()
    module = importlib.import_module(f"bandpo.engines.{name}")
    monkeypatch.setattr(_margins.inspect, "getsource", lambda place: "a new loss")
    with pytest.raises(ValueError, match=f"{name}==.*no longer holds"):
        importlib.reload(module)


def test_other_inputs_stop_prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    CASES["prime_rl"]()
    module = importlib.import_module("bandpo.engines.prime_rl")

    @dataclasses.dataclass
    class LossInputs:
        logprobs: torch.Tensor

    monkeypatch.setattr(sys.modules["prime_rl.trainer.rl.loss"], "LossInputs", LossInputs)
    with pytest.raises(ValueError, match="LossInputs no longer has advantages, inference_logprobs"):
        importlib.reload(module)


def test_an_older_tinker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    CASES["tinker"]()
    import tinker

    module = importlib.import_module("bandpo.engines.tinker")
    monkeypatch.setattr(tinker, "TrainingClient", object)
    with pytest.raises(ValueError, match="pip install 'tinker==0.38.0'"):
        importlib.reload(module)


def test_a_datum_without_an_input_is_named() -> None:
    CASES["tinker"]()
    from bandpo.engines.tinker import band_loss

    datum = types.SimpleNamespace(loss_fn_inputs={"target_tokens": 0, "advantages": 0})
    with pytest.raises(ValueError, match=r"data\[0\].loss_fn_inputs: must have 'logprobs'"):
        band_loss()([datum], [torch.zeros(2)])


def test_prime_rls_weights_and_kl_term() -> None:
    CASES["prime_rl"]()
    from prime_rl.trainer.rl.loss import LossInputs

    from bandpo.engines.prime_rl import band_loss

    x = tokens()
    new, old, adv, mask = x.rows()[2]
    keep, weights = mask.bool(), torch.tensor([torch.nan, 0.5, 2.0, 1.0, 0.0])
    out = band_loss(LossInputs(new, old, None, adv, keep, weights), clip="none", adv_tau=0.5, kl_tau=0.1)
    gap = (new - old)[keep]
    want = ((-gap.exp() * 0.5 * adv[keep] + 0.1 * gap.square()) * weights[keep]).sum()
    torch.testing.assert_close(out.loss, want)
    got, expected = (torch.autograd.grad(loss, x.logits, retain_graph=True)[0] for loss in (out.loss, want))
    torch.testing.assert_close(got, expected)


def slime_args(**options: Any) -> Any:
    return types.SimpleNamespace(use_rollout_logprobs=False, eps_clip=0.2, eps_clip_high=0.2, **options)


def test_slime_estimators_that_clip_no_ratio_are_refused() -> None:
    CASES["slime"]()
    from bandpo.engines.slime import band_loss

    with pytest.raises(ValueError, match="advantage_estimator='gspo': must be one that clips a token's ratio"):
        band_loss(slime_args(advantage_estimator="gspo"), {}, torch.zeros(1), torch.sum)


def test_skyrl_options_that_the_clip_replaces_are_refused() -> None:
    CASES["skyrl"]()
    from skyrl.train.config import AlgorithmConfig

    from bandpo.engines.skyrl import BandAlgorithmConfig, band_loss

    x: Tokens = tokens()
    for config, message in (
        (BandAlgorithmConfig(eps_clip_high=0.28), "eps_clip_high=0.28: must be left out"),
        (AlgorithmConfig(), "must be BandAlgorithmConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            band_loss(x.new(), x.old, x.advantages, config, x.mask)


@pytest.mark.parametrize("clip", [bandpo.Band(cap=None), bandpo.Fixed(1.0, 3.0), bandpo.NoClip()])
def test_margins_are_finite_whatever_comes(clip: bandpo.Region) -> None:
    old = torch.tensor([0.0, -1e-7, -1.0, -80.0, -1e4, -torch.inf, torch.nan, 0.5])
    eps_low, eps_high = _margins.margins(clip, old.requires_grad_())
    for eps in (eps_low, eps_high):
        assert eps.dtype == torch.float32 and not eps.requires_grad and torch.isfinite(eps).all() and (eps >= 0).all()
    assert (eps_low <= 1).all()


def test_band_with_total_variation_is_skyrls_dppo() -> None:
    """The mask that exists already: same gradient; with the band the value is the clipped objective's."""
    CASES["skyrl"]()
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.train.config import AlgorithmConfig
    from skyrl.train.config.config import DPPOConfig

    from bandpo.engines.skyrl import BandAlgorithmConfig

    x = tokens(3)
    dppo = AlgorithmConfig(policy_loss_type="dppo", dppo=DPPOConfig("binary_tv", 0.05, 0.05))
    band = BandAlgorithmConfig(clip_args={"divergence": "tv", "delta": 0.05, "cap": None})
    losses = [
        PolicyLossRegistry.get(c.policy_loss_type)(x.new(), x.old, x.advantages, config=c, loss_mask=x.mask)
        for c in (dppo, band)
    ]
    want, got = (torch.autograd.grad(loss, x.logits, retain_graph=True)[0] for loss, _ in losses)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (
        losses[0][1]["clip_ratio"] == pytest.approx(losses[1][1]["clip_zero_grad"]) and losses[0][1]["clip_ratio"] > 0
    )
