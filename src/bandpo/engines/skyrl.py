"""SkyRL's PPO loss under any clip, as the registered policy loss "bandpo"; tested with skyrl 0.4.0.

A region such as Band gives SkyRL's clamp two bounds per token. Any other clip goes as advantages c / r, with the clamp
opened wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bandpo import Clip, Tokens, clip_stats
from bandpo._input import InputError, nearest
from bandpo.clips.dual_clip import Dual
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

HOST = HOSTS["skyrl"]
with HOST.imports():
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.train.config import AlgorithmConfig

POLICY_LOSS = "bandpo"
_SEAM = (
    "ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high)",
    "surr1 = ratio * advantages",
    "log_probs - old_log_probs",
)
_REPLACED = ("eps_clip_low", "eps_clip_high")


def check_seam() -> None:
    """Check that the installed SkyRL still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(ppo_utils, "ppo_policy_loss", _SEAM)


check_seam()


@dataclass
class BandAlgorithmConfig(AlgorithmConfig):
    """SkyRL's AlgorithmConfig plus the clip; goes to `skyrl.train.config.make_config(algorithm_cls=...)`.

    Args:
        policy_loss_type: must be "bandpo".
        clip: the clip: a name or an import path, as `bandpo.get_clip` takes it, or from Python a clip.
        clip_args: that clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: whether a token with a negative advantage and a ratio above SkyRL's `clip_ratio_c` gets no gradient.
        clip_metrics: what is logged as ``clip_NAME``: "brief" (nine numbers), "full" (by sign of the advantage and by
            bucket of old probability too) or "none".

    Raises:
        InputError: another policy loss, a bad clip, one that SkyRL cannot carry, or an option that the clip replaces.
    """

    policy_loss_type: str = POLICY_LOSS
    clip: str = _adapter.CLIP
    clip_args: dict[str, Any] | None = None
    dual_clip: bool = False
    clip_metrics: str = "brief"

    def __post_init__(self) -> None:
        """Check the options; see the class."""
        if hasattr(AlgorithmConfig, "__post_init__"):  # not in 0.4.0
            super().__post_init__()
        self.make_clip()

    def make_clip(self) -> Clip:
        """Return the clip of these options; raise where SkyRL would not use it."""
        if self.policy_loss_type != POLICY_LOSS:
            raise InputError(
                f"policy_loss_type={self.policy_loss_type!r}: must be {POLICY_LOSS!r} with BandAlgorithmConfig, every "
                f"other loss goes round the clip{nearest(self.policy_loss_type, [POLICY_LOSS])}; leave it out, or use "
                "SkyRL's AlgorithmConfig"
            )
        _adapter.check_how_much(self.clip_metrics)
        defaults = {f.name: f.default for f in fields(AlgorithmConfig) if f.name in _REPLACED}
        _adapter.refuse_replaced(self, defaults, self.clip)
        clip = _adapter.make_clip(self.clip, self.clip_args)
        _adapter.refuse_needs(clip, ("rollout_logps",), "SkyRL")
        if not _adapter.by_margins(clip):
            _refuse_uneven(clip)
        return clip


def _refuse_uneven(clip: Clip) -> None:
    """Raise for a clip whose c is not proportional to A: SkyRL has divided A by the number of tokens by then."""
    log_p, signs, small = torch.tensor([[-0.1, -0.5, -1.0, -3.0]] * 2), torch.tensor([[1.0], [-1.0]]), 2.0**-10

    def c(scale: float) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # some clips draw tokens
            torch.manual_seed(0)
            return clip.coefficient(Tokens(1.2 * log_p, log_p, scale * signs, rollout_logps=log_p, entropies=-log_p))

    if not torch.allclose(small * c(1.0), c(small), rtol=1e-4, atol=0.0):
        raise InputError(
            f"clip={clip.name!r}: its coefficient is not proportional to A, which SkyRL divides by the number of "
            "tokens before its loss; must be a clip that is, such as clip='band'"
        )


@ppo_utils.register_policy_loss(POLICY_LOSS)
def band_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: BandAlgorithmConfig,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Return SkyRL's own PPO loss under the clip of `config`.

    Args:
        log_probs: log-probabilities under the policy in training, shape (batch, token).
        old_log_probs: those in the ratio's denominator, same shape.
        advantages: per token, same shape, scaled by SkyRL so that the loss is a sum.
        config: a `BandAlgorithmConfig`.
        loss_mask: 1 for tokens, 0 for padding, or None.
        rollout_logprobs: the sampler's log-probabilities, for SkyRL's off-policy correction and clips that need them.
        **more: what a later SkyRL gives its losses; passed on.

    Returns:
        SkyRL's loss, and its metrics with those of the clip as ``clip_NAME``. For a clip that goes as advantages
        "clip_ratio" is the share of tokens without a gradient.

    Raises:
        InputError: the configuration is not one that uses the clip, or the sampler's log-probabilities are missing.
    """
    if not isinstance(config, BandAlgorithmConfig):
        raise InputError(
            f"algorithm={type(config).__name__}: must be BandAlgorithmConfig; use "
            "make_config(algorithm_cls=BandAlgorithmConfig)"
        )
    clip = config.make_clip()  # made anew: the options may have been set after they were checked
    _adapter.refuse_needs(clip, () if rollout_logprobs is None else ("rollout_logps",), "SkyRL's generator")
    if loss_mask is not None:  # SkyRL multiplies by the mask: NaN in the padding would stay
        tokens = loss_mask.bool()
        log_probs, old_log_probs, advantages = (
            torch.where(tokens, x, 0.0) for x in (log_probs, old_log_probs, advantages)
        )
    given = log_probs, old_log_probs, advantages
    rest = {"loss_mask": loss_mask, "rollout_logprobs": rollout_logprobs, **more}
    way = _by_margins if _adapter.by_margins(clip) else _by_advantages
    return way(clip, config, given, rest)


_Tensors = tuple[Tensor, Tensor, Tensor]  # logps, old_logps, advantages
_Result = tuple[Tensor, dict[str, float]]


def _by_margins(clip: Any, config: BandAlgorithmConfig, given: _Tensors, rest: dict[str, Any]) -> _Result:
    """Return SkyRL's loss with the bounds of a region in the place of its two margins."""
    eps_low, eps_high = _adapter.margins(clip, given[1])
    kind = "dual_clip" if config.dual_clip else "regular"
    host = _adapter.View(config, policy_loss_type=kind, eps_clip_low=eps_low, eps_clip_high=eps_high)
    loss, metrics = ppo_utils.ppo_policy_loss(*given, host, **rest)
    if config.clip_metrics == "none":
        return loss, metrics
    cap = config.clip_ratio_c if config.dual_clip else None
    stats = clip_stats(given[0].detach(), *given[1:], rest["loss_mask"], clip=clip, dual_clip=cap)
    return loss, metrics | _adapter.as_floats(_adapter.chosen_metrics(stats, config.clip_metrics, "clip_"))


def _by_advantages(clip: Clip, config: BandAlgorithmConfig, given: _Tensors, rest: dict[str, Any]) -> _Result:
    """Return SkyRL's loss, its clamp opened wide, with c / r in the place of its advantages."""
    if config.dual_clip:  # ours, on c: SkyRL's own would act on c / r
        clip = Dual(clip, config.clip_ratio_c)
    rollout = rest["rollout_logprobs"] if "rollout_logps" in clip.needs else None
    shaped = _adapter.shape(clip, *given, rest["loss_mask"], rollout)
    # Where |log r| > 20 the new ones are moved, not the old: SkyRL's off-policy weights are made from those.
    new = given[0] + (given[1] - shaped.old_logps)
    host = _adapter.View(config, policy_loss_type="regular", eps_clip_low=math.inf, eps_clip_high=math.inf)
    loss, metrics = ppo_utils.ppo_policy_loss(new, given[1], shaped.advantages, host, **rest)
    ours = {"ratio": shaped.zero_grad} | _adapter.chosen_metrics(shaped.stats, config.clip_metrics, "")
    return loss, metrics | {f"clip_{name}": x for name, x in _adapter.as_floats(ours).items()}
