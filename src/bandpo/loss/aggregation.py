"""From one value per token to the loss: every host normalises in its own way, so the way is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bandpo._input import InputError, check_number, nearest

Aggregation = str | Callable[[Tensor, Tensor], Tensor]
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none")


def aggregate(
    per_token: Tensor,
    mask: Tensor | None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the mean or sum of per-token values that are already 0 where the mask is 0.

    Args:
        per_token: values, shape (batch, token) for the "seq-" forms, else any.
        mask: 1 for tokens, 0 for padding, same shape, any type; or None.
        aggregation: as in `policy_loss`.
        normalizer: as in `policy_loss`.

    Returns:
        A scalar; `per_token` itself for "none".
    """
    check_aggregation(aggregation, normalizer, per_token)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(per_token.dtype)  # a half type counts no further than 256 or 2048
    if callable(aggregation):
        return aggregation(per_token, torch.ones_like(per_token) if mask is None else mask)
    if aggregation == "none":
        return per_token
    if aggregation == "sum":
        return per_token.sum() if normalizer is None else per_token.sum() / normalizer
    if aggregation == "token-mean":
        if normalizer is None:
            normalizer = max(per_token.numel(), 1) if mask is None else mask.sum().clamp(min=1)
        return per_token.sum() / normalizer
    lengths = torch.ones_like(per_token).sum(-1) if mask is None else mask.sum(-1)
    sums = per_token.sum(-1) / (lengths.clamp(min=1) if aggregation == "seq-mean-token-mean" else 1)
    return sums.sum() / ((lengths > 0).sum().clamp(min=1) if normalizer is None else normalizer)


def check_aggregation(aggregation: object, normalizer: object, logps: Tensor) -> None:
    """Raise InputError for an unknown aggregation, or one that does not fit the tokens or the normalizer."""
    if not callable(aggregation) and aggregation not in AGGREGATIONS:
        hint = nearest(aggregation, AGGREGATIONS)
        raise InputError(f"aggregation={aggregation!r}: must be one of {', '.join(AGGREGATIONS)}, or a callable{hint}")
    if isinstance(aggregation, str) and aggregation.startswith("seq-") and logps.dim() < 2:
        raise InputError(
            f"aggregation={aggregation!r}: needs logps of shape (batch, token), got {logps.dim()}-d; reshape"
        )
    if normalizer is not None and (callable(aggregation) or aggregation == "none"):
        raise InputError(f"normalizer={normalizer!r}: has no use with aggregation={aggregation!r}; leave it out")
    if normalizer is not None and not isinstance(normalizer, Tensor):
        check_number("normalizer", normalizer, 0.0, open_low=True)
