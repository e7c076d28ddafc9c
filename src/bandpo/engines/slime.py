"""slime's policy loss with per-token bounds, for `--custom-loss-function-path`; slime has no package, see the docs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bandpo import Region
from bandpo._checks import InputError
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import CLIP, make_clip, margins, refuse_replaced, refuse_strays

HOST = HOSTS["slime"]
with HOST.imports():
    from slime.backends.megatron_utils import loss as host

_SEAM = (
    "ppo_kl = old_log_probs - log_probs",
    "compute_policy_loss(ppo_kl, advantages, args.eps_clip, args.eps_clip_high",
)
_DEFAULTS = {"eps_clip": 0.2, "eps_clip_high": 0.2}  # of slime; its parser needs Megatron


def check_seam() -> None:
    """Check that the installed slime still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(host, "policy_loss_function", _SEAM)


check_seam()


def band_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return slime's own policy loss with the bounds of the clip.

    Set ``--loss-type custom_loss --custom-loss-function-path bandpo.engines.slime.band_loss``; the options `clip` (a
    name, the band when there is none) and `clip_args` (a dict) are read from the YAML file of ``--custom-config-path``.

    Args:
        args: slime's arguments.
        batch: slime's micro-batch.
        logits: the model's output.
        sum_of_sample_mean: slime's reduction.

    Returns:
        slime's loss and metrics; it has no place for more, so `pg_clipfrac` is what the clip did.

    Raises:
        InputError: bad clip, a setting that the clip replaces, a loss that does not clip a token's ratio.
    """
    clip = _check_args(args)
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    mine = copy.copy(args)
    if old:  # without old log-probabilities every ratio is 1
        mine.eps_clip, mine.eps_clip_high = margins(clip, torch.cat(list(old)))
    return host.policy_loss_function(mine, batch, logits, sum_of_sample_mean)


def _check_args(args: Any) -> Region:
    """Return the clip; refuse arguments with which slime would not use it."""
    kind = host.get_pg_loss_type(args) if hasattr(host, "get_pg_loss_type") else None  # newer ones have it
    for name, value in (("advantage_estimator", args.advantage_estimator), ("policy loss type", kind)):
        if value in ("gspo", "cispo", "reinforce"):
            raise InputError(
                f"{name}={value!r}: must be one that clips a token's ratio; choose grpo, reinforce_plus_plus or ppo, "
                "or slime's own loss"
            )
    refuse_strays("custom-config-path", vars(args), known=("clip_grad",))  # the last is Megatron's
    clip = getattr(args, "clip", CLIP)
    region = make_clip(clip, getattr(args, "clip_args", None))
    refuse_replaced(args, _DEFAULTS, clip)
    return region
