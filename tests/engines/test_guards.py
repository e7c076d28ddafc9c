"""Every adapter stops, with one line that names the tested version, when the engine's seam has moved."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import types
from typing import Any

import pytest
import torch
from cases import CASES, Tokens, call_slime, tokens

import bandpo
from bandpo.engines import _adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines, at import


@pytest.mark.parametrize("name", ["torchrl_ppo", "torchrl_grpo"])
def test_a_moved_clamp_stops_torchrl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    monkeypatch.setattr(inspect, "getsource", lambda place: "a new loss")
    with pytest.raises(ValueError, match=r"torchrl==.*no longer holds `log_weight.clamp.*torchrl==0.14.1"):
        case.ours(tokens(), "band", None)


def test_a_moved_clamp_stops_rllib(monkeypatch: pytest.MonkeyPatch) -> None:
    CASES["rllib"]()
    from bandpo.engines.rllib import BandPPOTorchLearner

    monkeypatch.setattr(inspect, "getsource", lambda place: "a new loss")
    with pytest.raises(ValueError, match=r"ray==.*longer holds `torch.clamp.*must be ray\[rllib\]>=.*: pip install '"):
        BandPPOTorchLearner.build(object.__new__(BandPPOTorchLearner))


@pytest.mark.parametrize("name", ["skyrl", "slime"])
def test_a_moved_clamp_stops_at_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[name]()
    module = importlib.import_module(f"bandpo.engines.{name}")
    monkeypatch.setattr(inspect, "getsource", lambda place: "a new loss")
    with pytest.raises(ValueError, match=f"{name}.*no longer holds"):
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


def test_a_datum_without_an_input_is_named() -> None:
    CASES["tinker"]()
    from bandpo.engines.tinker import band_loss

    datum = types.SimpleNamespace(loss_fn_inputs={"target_tokens": 0, "advantages": 0})
    with pytest.raises(ValueError, match=r"data\[0\].loss_fn_inputs: must have 'logprobs'"):
        band_loss()([datum], [torch.zeros(2)])
    longer = types.SimpleNamespace(to_torch=lambda: torch.zeros(3))
    datum = types.SimpleNamespace(loss_fn_inputs={"logprobs": longer})
    with pytest.raises(ValueError, match=r"data\[0\].loss_fn_inputs\['logprobs'\] has shape \(3,\): must be \(2,\)"):
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


SLIME = [
    (
        {"advantage_estimator": "gspo"},
        "advantage_estimator='gspo': must be one that clips a token's ratio; choose grpo",
    ),
    ({"advantage_estimator": "gspo"}, "or ppo with clip='gspo', or slime's own loss"),
    ({"clip_metrics": "all"}, "clip_metrics='all': must be one of brief, full, none"),
    ({"clip_arg": {"delta": 0.1}}, "'clip_arg' is unknown"),
    ({"delta": 2.0}, "'delta' is an argument of the clip; write clip_args={'delta': ...}"),
    ({"dual_clip": 3.0}, "'dual_clip' is unknown"),
    ({"eps_clip": 0.9}, "eps_clip=0.9: must be left out, clip='band' sets the bounds"),
    ({"eps_clip_high": 0.28}, "eps_clip_high=0.28: must be left out"),
]


@pytest.mark.parametrize(("options", "message"), SLIME)
def test_slime_settings_that_would_have_no_effect_are_refused(options: dict[str, Any], message: str) -> None:
    CASES["slime"]()
    from bandpo.engines.slime import band_loss

    with pytest.raises(ValueError, match=re.escape(message)):
        call_slime(tokens(), band_loss, **options)
    call_slime(tokens(), band_loss, clip_grad=1.0)  # Megatron's


@pytest.mark.parametrize("kind", ["reinforce", "cispo"])
def test_slime_losses_that_clip_no_ratio_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime can take another loss with the same estimator; newer versions say which."""
    CASES["slime"]()
    from bandpo.engines import slime

    monkeypatch.setattr(slime.host, "get_pg_loss_type", lambda args: kind, raising=False)
    with pytest.raises(ValueError, match=f"policy loss type='{kind}': must be one that clips a token's ratio"):
        call_slime(tokens(), slime.band_loss)


def test_slimes_cispo_is_not_taken_for_its_clipped_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The margins go to a loss that the clip does not suit, and the clamp is gone."""
    CASES["slime"]()
    from bandpo.engines import slime

    def policy_loss_function(args: Any, old_log_probs: Any, log_probs: Any, advantages: Any) -> Any:
        ppo_kl = old_log_probs - log_probs
        return compute_cispo_loss(ppo_kl, log_probs, advantages, args.eps_clip, args.eps_clip_high)  # type: ignore[name-defined]  # noqa: F821

    monkeypatch.setattr(slime.host, "policy_loss_function", policy_loss_function)
    with pytest.raises(ValueError, match="no longer holds `compute_policy_loss"):
        slime.check_seam()


def test_skyrl_options_that_go_round_the_clip_are_refused() -> None:
    CASES["skyrl"]()
    from skyrl.train.config import AlgorithmConfig, make_config

    from bandpo.engines.skyrl import BandAlgorithmConfig, band_loss

    for options, message in (
        ({"eps_clip_high": 0.28}, "eps_clip_high=0.28: must be left out"),
        ({"policy_loss_type": "regular"}, "policy_loss_type='regular': must be 'bandpo'"),
        ({"policy_loss_type": "gspo", "clip_args": {"delta": 0.1}}, "policy_loss_type='gspo': must be 'bandpo'"),
        ({"clip_args": {"detla": 0.1}}, "did you mean 'delta'"),
    ):
        with pytest.raises(ValueError, match=message):
            BandAlgorithmConfig(**options)
    words = ["trainer.algorithm.policy_loss_type=regular", "trainer.algorithm.clip_args={delta: 0.1}"]
    with pytest.raises(ValueError, match="policy_loss_type='regular'"):
        make_config(algorithm_cls=BandAlgorithmConfig).from_cli_overrides(words)
    x: Tokens = tokens()
    late = BandAlgorithmConfig()
    late.eps_clip_low = 0.1
    for config, message in ((AlgorithmConfig(), "must be BandAlgorithmConfig"), (late, "eps_clip_low=0.1")):
        with pytest.raises(ValueError, match=message):
            band_loss(x.new(), x.old, x.advantages, config, x.mask)


@pytest.mark.parametrize("clip", [bandpo.Band(), bandpo.Band(cap=10.0), bandpo.Fixed(1.0, 3.0), bandpo.NoClip()])
def test_margins_are_finite_whatever_comes(clip: bandpo.Region) -> None:
    old = torch.tensor([0.0, -1e-7, -1.0, -80.0, -1e4, -torch.inf, torch.nan, 0.5])
    eps_low, eps_high = _adapter.margins(clip, old.requires_grad_())
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
    band = BandAlgorithmConfig(clip_args={"divergence": "tv", "delta": 0.05})
    losses = [
        PolicyLossRegistry.get(c.policy_loss_type)(x.new(), x.old, x.advantages, config=c, loss_mask=x.mask)
        for c in (dppo, band)
    ]
    want, got = (torch.autograd.grad(loss, x.logits, retain_graph=True)[0] for loss, _ in losses)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (
        losses[0][1]["clip_ratio"] == pytest.approx(losses[1][1]["clip_zero_grad"]) and losses[0][1]["clip_ratio"] > 0
    )
