"""slime's policy loss with per-token bounds, for `--custom-loss-function-path`; slime has no package, see the docs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from slime.backends.megatron_utils import loss as host
from torch import Tensor

from bandpo._checks import InputError
from bandpo.engines._margins import check_source, make_clip, margins

_TESTED = "the commit that bandpo's documentation names"
_SEAM = ("ppo_kl = old_log_probs - log_probs", "args.eps_clip, args.eps_clip_high")


def check_seam() -> None:
    """Check that the installed slime still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    check_source("slime", "(git)", _TESTED, host.policy_loss_function, _SEAM)


check_seam()


def band_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return slime's own policy loss with the bounds of the clip.

    Set ``--loss-type custom_loss --custom-loss-function-path bandpo.engines.slime.band_loss``; the options `clip` (a
    name, "band" when there is none) and `clip_args` (a dict) are read from the YAML file of ``--custom-config-path``.

    Args:
        args: slime's arguments.
        batch: slime's micro-batch.
        logits: the model's output.
        sum_of_sample_mean: slime's reduction.

    Returns:
        slime's loss and metrics; it has no place for more, so `pg_clipfrac` is what the clip did.

    Raises:
        InputError: bad clip, an advantage estimator that does not clip a token's ratio.
    """
    if args.advantage_estimator in ("gspo", "cispo"):
        raise InputError(
            f"advantage_estimator={args.advantage_estimator!r}: must be one that clips a token's ratio; choose grpo, "
            "reinforce_plus_plus or ppo, or slime's own loss"
        )
    clip = make_clip(getattr(args, "clip", "band"), getattr(args, "clip_args", None))
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    mine = copy.copy(args)
    if old:  # without old log-probabilities every ratio is 1
        mine.eps_clip, mine.eps_clip_high = margins(clip, torch.cat(list(old)))
    return host.policy_loss_function(mine, batch, logits, sum_of_sample_mean)
