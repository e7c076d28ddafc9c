"""SkyRL: the clips that it has too are its own, its dual clip and off-policy weights hold beside ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Tokens, tokens

import bandpo

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore")  # of SkyRL, at import


@pytest.fixture(autouse=True)
def skyrl() -> None:
    CASES["skyrl"]()  # skips where it is not installed


def call(x: Tokens, config: Any, rollout: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    loss = PolicyLossRegistry.get(config.policy_loss_type)
    return loss(x.new(), x.old, x.advantages, config=config, loss_mask=x.mask, rollout_logprobs=rollout)


def own(kind: str) -> Any:
    from skyrl.train.config import AlgorithmConfig
    from skyrl.train.config.config import CISPOConfig, DPPOConfig, SAPOConfig

    options = {
        "sapo": {"sapo": SAPOConfig(tau_pos=2.0, tau_neg=3.0)},
        "cispo": {"cispo": CISPOConfig(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.3)},
        "gspo": {"eps_clip_low": 0.05, "eps_clip_high": 0.1},
        "dppo": {"dppo": DPPOConfig("binary_kl", 0.02, 0.05)},
        "dual_clip": {"clip_ratio_c": 1.4},
    }[kind]
    return AlgorithmConfig(policy_loss_type=kind, loss_reduction="sequence_mean", **options)


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "sapo": ("sapo", {"tau_pos": 2.0, "tau_neg": 3.0}),
    "cispo": ("cispo", {"eps_low": 0.2, "eps_high": 0.3}),
    "gspo": ("gspo", {"eps_low": 0.05, "eps_high": 0.1}),
    "dppo": ("dppo_kl", {"delta": (0.02, 0.05), "cap": None}),
    "dual_clip": ("dual_clip", {"cap": 1.4}),
}


@pytest.mark.parametrize("weights", [None, "token"])
@pytest.mark.parametrize("kind", OURS)
def test_the_gradient_is_that_of_skyrls_own_loss(kind: str, weights: str | None) -> None:
    from skyrl.train.config.config import OffPolicyCorrectionConfig

    from bandpo.engines.skyrl import BandAlgorithmConfig

    if kind == "dppo" and weights:
        pytest.skip("SkyRL's own then divides by the sampler's probabilities")
    x, (clip, clip_args) = tokens(6), OURS[kind]
    rollout = x.old - 0.3 * torch.randn(x.old.shape, generator=torch.Generator().manual_seed(0)) if weights else None
    want, got = own(kind), BandAlgorithmConfig(clip=clip, clip_args=clip_args)
    for config in (want, got):
        config.off_policy_correction = OffPolicyCorrectionConfig(tis_ratio_type=weights)
    (one, theirs), (other, mine) = call(x, want, rollout), call(x, got, rollout)
    torch.testing.assert_close(x.gradient(other), x.gradient(one), rtol=1e-5, atol=1e-6)
    if kind in ("gspo", "dppo"):  # of the others SkyRL counts something else
        assert mine["clip_ratio"] == pytest.approx(theirs["clip_ratio"], abs=1e-6) and mine["clip_ratio"] > 0


@pytest.mark.parametrize("clip", ["band", "sapo"])
def test_skyrls_dual_clip_holds_beside_any_clip(clip: str) -> None:
    from bandpo.engines.skyrl import BandAlgorithmConfig

    case, x = CASES["skyrl"](), tokens(7)
    config = BandAlgorithmConfig(clip=clip, dual_clip=True, clip_ratio_c=1.3)
    loss, metrics = call(x, config)
    t = x.seen()
    c = bandpo.get_clip(clip).coefficient(t)
    beyond = (t.ratio > 1.3) & (t.advantages < 0)
    torch.testing.assert_close(x.gradient(loss), case.carries(x, torch.where(beyond, 0.0, c)), rtol=1e-5, atol=1e-6)
    assert (c * beyond).abs().max() > 0.01 and metrics["clip_zero_grad"] > 0


def test_off_policy_weights_come_from_the_true_log_probabilities() -> None:
    """Where a ratio is past e^20 the new log-probability is moved, not the old one."""
    from skyrl.train.config.config import OffPolicyCorrectionConfig

    from bandpo.engines.skyrl import BandAlgorithmConfig

    case, x = CASES["skyrl"](), tokens(8)
    x.old = x.old - torch.tensor([30.0, 0.0, 0.0, 0.0, 0.0])
    config = BandAlgorithmConfig(clip="cispo")
    config.off_policy_correction = OffPolicyCorrectionConfig(tis_ratio_type="token", token_tis_ratio_clip_high=5.0)
    c = bandpo.get_clip("cispo").coefficient(x.seen())
    loss, _ = call(x, config, x.old + 0.7)
    torch.testing.assert_close(
        x.gradient(loss), case.carries(x, c * torch.exp(torch.tensor(-0.7))), rtol=1e-5, atol=1e-6
    )


class Uneven:
    """A clip whose c has a part that does not grow with A."""

    def coefficient(self, tokens: Any) -> Tensor:
        return tokens.weighted - 0.1 * tokens.log_r


class Sampled:
    needs = ("rollout_logps",)

    def coefficient(self, tokens: Any) -> Tensor:
        return tokens.weighted * torch.exp(tokens.rollout_logps)


def test_what_skyrl_cannot_carry_is_refused() -> None:
    from bandpo.engines.skyrl import BandAlgorithmConfig

    with pytest.raises(
        ValueError, match="clip='Uneven': its coefficient is not proportional to A, which SkyRL divides"
    ):
        BandAlgorithmConfig(clip=Uneven())
    for clip in ("dro", "kl_cov"):
        with pytest.raises(ValueError, match=f"clip='{clip}': its coefficient is not proportional to A"):
            BandAlgorithmConfig(clip=clip)
    config = BandAlgorithmConfig(clip=Sampled())
    with pytest.raises(ValueError, match="clip='Sampled': needs rollout_logps, which SkyRL's generator does not"):
        call(tokens(), config)
