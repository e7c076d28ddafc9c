"""A loss under any clip for prime-rl's `[trainer.loss] type = "custom"`; prime-rl has no package, see the docs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from bandpo import policy_loss
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

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
    clip: object = _adapter.CLIP,
    clip_args: Mapping[str, Any] | None = None,
    dual_clip: float | None = None,
    adv_tau: float = 1.0,
    kl_tau: float = 0.0,
    clip_metrics: str = "brief",
) -> LossOutputs:
    """Return the loss of one sequence under a clip, summed over its tokens, which is how prime-rl's own losses reduce.

    loss = sum_t w_t ( -min(r A, clip(r) A) + kl_tau (log r)^2 ),  A = adv_tau * advantage

    That is its value for a hard gate; for any other clip -r A, detached, stands for the first term, whose gradient is
    the clip's c.

    Args:
        inputs: one sequence, as prime-rl gives it.
        clip: the clip: a name or an import path, as `bandpo.get_clip` takes it, a clip, or any object with
            `coefficient(tokens)`. Its p and r belong to `inference_logprobs`.
        clip_args: the clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: with A < 0, no gradient above this ratio: > 1, or None.
        adv_tau: factor of the advantages, as in prime-rl's losses.
        kl_tau: weight of the squared log-ratio, the KL term that a custom loss replaces in the versions that have one
            (their default is 1e-3); over all tokens, clipped ones too.
        clip_metrics: "brief" (nine numbers), "full" (by sign of the advantage and by bucket of old probability too) or
            "none".

    Returns:
        prime-rl's LossOutputs; metrics are tensors of no dimension, as ``clip/NAME``.

    Raises:
        InputError: bad clip, one that needs what prime-rl has not, or prime-rl's inputs have changed.
    """
    made = _adapter.make_clip(clip, clip_args)
    _adapter.refuse_needs(made, (), "prime-rl, with its one set of old log-probabilities,")
    _adapter.check_how_much(clip_metrics)
    x = inputs
    new, old, mask = (each[None] for each in (x.trainer_logprobs, x.inference_logprobs.detach(), x.loss_mask))
    out = policy_loss(
        new, old, adv_tau * x.advantages[None], mask, clip=made, dual_clip=dual_clip, aggregation="none",
        metrics=clip_metrics != "none", exact_value=_adapter.has_value(made),
    )  # fmt: skip
    per_token = out.loss
    if kl_tau:
        per_token = per_token + kl_tau * (torch.where(mask, new, 0.0) - torch.where(mask, old, 0.0)).square()
    if x.loss_weights is not None:
        per_token = per_token * torch.where(mask, x.loss_weights[None], 0.0)
    return LossOutputs(loss=per_token.sum(), metrics=_adapter.picked(out.metrics, clip_metrics, "clip/"))
