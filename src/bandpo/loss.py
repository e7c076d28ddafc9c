"""The policy loss: PPO's clipped objective under any clip, its gradient exact, its metrics left on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bandpo._checks import InputError, check_number, check_tensor, nearest
from bandpo.aggregation import AGGREGATIONS, Aggregation, aggregate
from bandpo.clips import Band, Region
from bandpo.diagnostics import ClipStats, count
from bandpo.gate import hard_gate
from bandpo.kernels import choose, fused_loss
from bandpo.move import keep, working_dtype


@dataclass(frozen=True)
class LossOutput:
    """What `policy_loss` returns.

    Args:
        loss: to call backward() on: a scalar, or one value per token with aggregation "none".
        metrics: name to tensor of no dimension; nothing has moved to the host.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class _Attach(torch.autograd.Function):
    """Give per-token values a gradient that is known already: one tensor is saved for backward."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, value: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        ctx.dtype = logps.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (coefficient,) = ctx.saved_tensors
        return (grads[0] * coefficient).to(ctx.dtype), None, None


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: Region | None = None,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    metrics: bool = True,
    exact_value: bool = False,
    validate: bool = False,
) -> LossOutput:
    """Return the clipped policy-gradient loss under any clip.

    loss = -aggregate( min(r A, clip(r) A) ),  r = exp(logps - old_logps), with gradient coefficient -r A / norm per
    token, and 0 where the token is outside its region and A pushes it further out.

    Args:
        logps: natural-log probabilities of the taken actions under the policy in training, (batch, token) or any shape.
        old_logps: the same under the policy that the ratio divides by, same shape; no gradient flows into it.
        advantages: per token, or per sequence (batch,) or (batch, 1).
        mask: 1 for tokens, 0 for padding, same shape, or None. Padding may hold anything, NaN too.
        clip: the region, `Band()` when None.
        dual_clip: with A < 0, no gradient above this ratio: > 1, or None.
        aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" (means over the sequences that have
            tokens), "sum", "none" (per token), or a callable (per_token, mask) -> scalar.
        normalizer: a constant in place of the number of tokens or sequences that the mean divides by; divides a "sum".
        metrics: whether to count what the clip did (`ClipStats.metrics`).
        exact_value: clipped tokens count in the loss's value as min(r A, clip(r) A), for which the bounds are solved;
            otherwise as r A, detached. The gradient is the same.
        validate: check the tensors' values too, at the price of a host synchronisation.

    Returns:
        `LossOutput`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an unknown aggregation, an argument out of its range.

    Source: arXiv 1707.06347 (PPO), 2603.04918 (Band), 1912.09729 (dual clip).
    """
    clip = Band() if clip is None else clip
    advantages = _check(logps, old_logps, advantages, mask, clip, dual_clip, aggregation, normalizer)
    if validate:
        _validate(logps, old_logps, advantages, mask)
    rule = choose(logps, old_logps, advantages, mask, clip, dual_clip, exact_value)
    if rule is not None:
        loss, stats = fused_loss(rule, logps, old_logps, advantages, mask, aggregation, normalizer, metrics)
        return LossOutput(loss, {} if stats is None else stats.metrics())
    if mask is not None and torch.compiler.is_compiling():
        mask = mask.to(working_dtype(logps))  # once: Inductor's CPU code is slow at loading bools
    gated = hard_gate(logps, old_logps, advantages, mask, clip, dual_clip, want_reached=metrics)
    value, state, reached = gated.value, gated.state, gated.reached
    if exact_value:
        value = _objective(logps, old_logps, advantages, mask, clip, dual_clip)
    per_token = _Attach.apply(logps, value, gated.coefficient)  # type: ignore[no-untyped-call]
    del gated, value
    loss = aggregate(per_token, mask, aggregation, normalizer)
    if not metrics or reached is None:
        return LossOutput(loss)
    del per_token
    return LossOutput(loss, count(state, reached, old_logps, mask).metrics())


@torch.no_grad()
def clip_stats(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: Region | None = None,
    dual_clip: float | None = None,
) -> ClipStats:
    """Return what a clip does to these tokens, as sums by bucket of old probability.

    Args:
        logps: as in `policy_loss`.
        old_logps: as in `policy_loss`.
        advantages: as in `policy_loss`.
        mask: as in `policy_loss`.
        clip: the region, `Band()` when None.
        dual_clip: as in `policy_loss`.

    Returns:
        `ClipStats`: add them over batches, sum and max their fields over ranks, then call `.metrics()`.

    Raises:
        InputError: as `policy_loss`.
    """
    clip = Band() if clip is None else clip
    advantages = _check(logps, old_logps, advantages, mask, clip, dual_clip, "none", None)
    rule = choose(logps, old_logps, advantages, mask, clip, dual_clip)
    if rule is not None:
        stats = fused_loss(rule, logps, old_logps, advantages, mask, "sum", None, True)[1]
        assert stats is not None
        return stats
    gated = hard_gate(logps, old_logps, advantages, mask, clip, dual_clip)
    assert gated.reached is not None
    return count(gated.state, gated.reached, old_logps, mask)


@torch.no_grad()
def _objective(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None, clip: Region, dual_clip: float | None
) -> Tensor:
    """Return -min(r A, clip(r) A) per token, the dual clip's constant included; this value needs the roots."""
    dtype = working_dtype(logps)
    old, adv = keep(old_logps.to(dtype), mask), keep(advantages.to(dtype).expand_as(logps), mask)
    log_ratio = keep(logps.to(dtype), mask) - old
    bounds = clip.bounds(old)
    clipped = torch.exp(torch.minimum(torch.maximum(log_ratio, bounds.log_low), bounds.log_high))
    value = torch.maximum(-torch.exp(log_ratio) * adv, -clipped * adv)
    return value if dual_clip is None else torch.where(adv < 0, torch.minimum(value, -dual_clip * adv), value)


def _check(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: object,
    dual_clip: float | None,
    aggregation: object,
    normalizer: object,
) -> Tensor:
    """Check everything that does not need a tensor's values; return the advantages in a shape that broadcasts."""
    check_tensor("logps", logps)
    check_tensor("old_logps", old_logps, like=logps)
    check_tensor("advantages", advantages)
    if not isinstance(clip, Region):
        raise InputError(f"clip={clip!r}: must be a clip; give bandpo.Band(), bandpo.Fixed() or bandpo.get_clip(name)")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != logps.shape or mask.device != logps.device):
        got = f"shape {tuple(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"mask has {got}: must be a tensor like logps, {tuple(logps.shape)} on {logps.device}")
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, 1.0, open_low=True)
    if not callable(aggregation) and aggregation not in AGGREGATIONS:
        allowed = ", ".join(AGGREGATIONS)
        hint = nearest(aggregation, AGGREGATIONS)
        raise InputError(f"aggregation={aggregation!r}: must be one of {allowed}, or a callable{hint}")
    if isinstance(aggregation, str) and aggregation.startswith("seq-") and logps.dim() < 2:
        raise InputError(
            f"aggregation={aggregation!r}: needs logps of shape (batch, token), got {logps.dim()}-d; reshape"
        )
    if normalizer is not None and (callable(aggregation) or aggregation == "none"):
        raise InputError(f"normalizer={normalizer!r}: has no use with aggregation={aggregation!r}; leave it out")
    if normalizer is not None and not isinstance(normalizer, Tensor):
        check_number("normalizer", normalizer, 0.0, open_low=True)
    if logps.dim() > 1 and advantages.shape == logps.shape[:-1]:
        advantages = advantages.unsqueeze(-1)
    if advantages.device != logps.device or advantages.shape not in (logps.shape, (*logps.shape[:-1], 1)):
        raise InputError(
            f"advantages has shape {tuple(advantages.shape)} on {advantages.device}: must be per token "
            f"{tuple(logps.shape)} or per sequence {tuple(logps.shape[:-1])}, on {logps.device}"
        )
    return advantages


def _validate(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None) -> None:
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("mask holds values other than 0 and 1: give 1 for tokens and 0 for padding")
    for name, x in (("logps", logps), ("old_logps", old_logps), ("advantages", advantages)):
        kept = keep(x.to(working_dtype(x)).expand_as(logps), mask)
        bad = int((~torch.isfinite(kept)).sum())
        if bad:
            raise InputError(f"{name} holds {bad} values that are NaN or infinite where mask is 1: mask or mend them")
        if name != "advantages" and bool((kept > 0).any()):
            raise InputError(f"{name} holds values above 0 where mask is 1: must be logarithms of probabilities")
