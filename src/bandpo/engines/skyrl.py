"""SkyRL's PPO loss with per-token bounds, as the registered policy loss "bandpo"; tested with skyrl 0.4.0."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bandpo import Region, clip_stats
from bandpo._checks import InputError, nearest
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import CLIP, View, as_floats, make_clip, margins, overall, refuse_replaced

HOST = HOSTS["skyrl"]
with HOST.imports():
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.train.config import AlgorithmConfig

POLICY_LOSS = "bandpo"
_SEAM = ("ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high)", "log_probs - old_log_probs")
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
        clip: name of the clip, as `bandpo.get_clip` takes it.
        clip_args: that clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: whether SkyRL's dual clip, with its `clip_ratio_c`, is on as well.

    Raises:
        InputError: another policy loss, a bad clip, or an option that the clip replaces.
    """

    policy_loss_type: str = POLICY_LOSS
    clip: str = CLIP
    clip_args: dict[str, Any] | None = None
    dual_clip: bool = False

    def __post_init__(self) -> None:
        """Check the options; see the class."""
        if hasattr(AlgorithmConfig, "__post_init__"):  # not in 0.4.0
            super().__post_init__()
        self.region()

    def region(self) -> Region:
        """Return the clip of these options; raise where SkyRL would not use it."""
        if self.policy_loss_type != POLICY_LOSS:
            raise InputError(
                f"policy_loss_type={self.policy_loss_type!r}: must be {POLICY_LOSS!r} with BandAlgorithmConfig, every "
                f"other loss goes round the clip{nearest(self.policy_loss_type, [POLICY_LOSS])}; leave it out, or use "
                "SkyRL's AlgorithmConfig"
            )
        defaults = {f.name: f.default for f in fields(AlgorithmConfig) if f.name in _REPLACED}
        refuse_replaced(self, defaults, self.clip)
        return make_clip(self.clip, self.clip_args)


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
    """Return SkyRL's own clipped loss with the bounds of `config.clip`.

    Args:
        log_probs: log-probabilities under the policy in training, shape (batch, token).
        old_log_probs: those in the ratio's denominator, same shape.
        advantages: per token, same shape, scaled by SkyRL so that the loss is a sum.
        config: a `BandAlgorithmConfig`.
        loss_mask: 1 for tokens, 0 for padding, or None.
        rollout_logprobs: the sampler's log-probabilities, for SkyRL's off-policy correction.
        **more: what a later SkyRL gives its losses; passed on.

    Returns:
        SkyRL's loss, and its metrics with those of the clip as ``clip_NAME``.

    Raises:
        InputError: the configuration is not one that uses the clip.
    """
    if not isinstance(config, BandAlgorithmConfig):
        raise InputError(
            f"algorithm={type(config).__name__}: must be BandAlgorithmConfig; use "
            "make_config(algorithm_cls=BandAlgorithmConfig)"
        )
    clip = config.region()  # made anew: the options may have been set after they were checked
    if loss_mask is not None:  # SkyRL multiplies by the mask: NaN in the padding would stay
        tokens = loss_mask.bool()
        log_probs, old_log_probs, advantages = (
            torch.where(tokens, x, 0.0) for x in (log_probs, old_log_probs, advantages)
        )
    eps_low, eps_high = margins(clip, old_log_probs)
    kind = "dual_clip" if config.dual_clip else "regular"
    host = View(config, policy_loss_type=kind, eps_clip_low=eps_low, eps_clip_high=eps_high)
    loss, metrics = ppo_utils.ppo_policy_loss(
        log_probs, old_log_probs, advantages, host, loss_mask, rollout_logprobs, **more
    )
    dual_clip = config.clip_ratio_c if config.dual_clip else None
    stats = clip_stats(log_probs.detach(), old_log_probs, advantages, loss_mask, clip=clip, dual_clip=dual_clip)
    return loss, metrics | as_floats(overall(stats.metrics(), "clip_"))
