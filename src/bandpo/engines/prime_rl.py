"""A loss for prime-rl's `[trainer.loss] type = "custom"`; it has no package, the docs name the commits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from bandpo import Region, policy_loss
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import CLIP, make_clip, overall

HOST = HOSTS["prime_rl"]
with HOST.imports():
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

_USED = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "loss_weights")


def check_seam() -> None:
    """Check that the installed prime-rl still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    for kind, used in ((LossInputs, _USED), (LossOutputs, ("loss", "metrics"))):
        missing = set(used) - {f.name for f in fields(kind)}
        if missing:
            raise HOST.error(f"its {kind.__name__} no longer has {', '.join(sorted(missing))}, which the clip needs")


check_seam()


def band_loss(
    inputs: LossInputs,
    clip: str | Region = CLIP,
    clip_args: Mapping[str, Any] | None = None,
    dual_clip: float | None = None,
    adv_tau: float = 1.0,
    kl_tau: float = 0.0,
) -> LossOutputs:
    """Return the clipped loss of one sequence, summed over its tokens, which is how prime-rl's own losses reduce.

    loss = sum_t w_t ( -min(r A, clip(r) A) + kl_tau (log r)^2 ),  A = adv_tau * advantage

    Args:
        inputs: one sequence, as prime-rl gives it.
        clip: name of the clip, or a clip; the bounds belong to `inference_logprobs`.
        clip_args: the clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: with A < 0, no gradient above this ratio: > 1, or None.
        adv_tau: factor of the advantages, as in prime-rl's losses.
        kl_tau: weight of the squared log-ratio, the KL term that a custom loss replaces in the versions that have one
            (their default is 1e-3); over all tokens, clipped ones too.

    Returns:
        prime-rl's LossOutputs; metrics are tensors of no dimension, as ``clip/NAME``.

    Raises:
        InputError: bad clip, or prime-rl's inputs have changed.
    """
    x = inputs
    new, old, mask = x.trainer_logprobs, x.inference_logprobs.detach(), x.loss_mask
    advantages = adv_tau * x.advantages
    out = policy_loss(
        new, old, advantages, mask, clip=make_clip(clip, clip_args), dual_clip=dual_clip, aggregation="none",
        exact_value=True,
    )  # fmt: skip
    per_token = out.loss
    if kl_tau:
        per_token = per_token + kl_tau * (torch.where(mask, new, 0.0) - torch.where(mask, old, 0.0)).square()
    if x.loss_weights is not None:
        per_token = per_token * torch.where(mask, x.loss_weights, 0.0)
    return LossOutputs(loss=per_token.sum(), metrics=overall(out.metrics, "clip/"))
