"""Sums over the tokens of each sequence, for clips that look at sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.operator.tokens import Tokens


def lengths(tokens: Tokens) -> Tensor:
    """Return how many tokens each sequence has.

    Args:
        tokens: of shape (batch, token).

    Returns:
        Tensor (batch, 1), in the dtype of `log_r`.

    Raises:
        InputError: the tokens have no sequences: fewer than two dimensions.
    """
    if tokens.log_p.dim() < 2:
        raise InputError(
            f"logps has shape {tuple(tokens.log_p.shape)}: a clip of sequences needs (batch, token); give "
            "logps[None] for a single sequence"
        )
    if tokens.mask is None:
        return torch.full_like(tokens.log_r[..., :1], tokens.log_r.shape[-1])
    return tokens.mask.sum(-1, keepdim=True).to(tokens.log_r.dtype)


def sequence_mean(x: Tensor, tokens: Tokens) -> Tensor:
    """Return the mean of `x` over each sequence's tokens.

    Args:
        x: of the tokens' shape, 0 in padding.
        tokens: of shape (batch, token).

    Returns:
        Tensor (batch, 1), 0 for a sequence without tokens.

    Raises:
        InputError: as `lengths`.
    """
    return x.sum(-1, keepdim=True) / lengths(tokens).clamp(min=1)


def sequence_max(x: Tensor, tokens: Tokens) -> Tensor:
    """Return the maximum of `x` over each sequence's tokens.

    Args:
        x: of the tokens' shape, at least 0, and 0 in padding.
        tokens: of shape (batch, token).

    Returns:
        Tensor (batch, 1).

    Raises:
        InputError: as `lengths`.
    """
    lengths(tokens)
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)  # of no tokens: 0
