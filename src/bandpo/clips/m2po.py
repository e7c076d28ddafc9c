"""M2PO: a budget for the batch's second moment of the log-ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.masks import Mask
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class M2po(Mask):
    """The tokens that moved outward most are dropped until the batch's mean of (log r)^2 is within a budget.

    c = r A,  or 0 for the outward tokens of largest (log r)^2 without which mean((log r)^2) <= budget

    The mean is over all tokens; a dropped one counts 0 in it.

    Args:
        budget: of the mean square of log r, > 0.

    Raises:
        InputError: a budget that is not positive.

    Source: arXiv 2510.01161, where it is tau. The authors' code differs: its mean is over the outward tokens, and a
    dropped one counts tau^2 in it. In a host the batch is a micro-batch.
    """

    name: ClassVar[str] = "m2po"
    paper: ClassVar[str] = "2510.01161"
    looks_at: ClassVar[str] = "batch"
    uses_p: ClassVar[bool] = False
    budget: float = 0.04

    def __post_init__(self) -> None:
        check_number("budget", self.budget, 0.0, open_low=True)

    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 where a token is dropped."""
        square = tokens.log_r.clamp(-1e15, 1e15) ** 2
        outward = above(tokens.log_r.sign() * tokens.advantages, 0.0)
        count = square.numel() if tokens.mask is None else tokens.mask.sum().clamp(min=1)
        loose, order = (square * outward).flatten().sort()  # what may be dropped, the smallest first
        rest = (square * (1 - outward)).sum()  # what may not
        over = above(loose.cumsum(0) + rest, self.budget * count) * above(loose, 0.0)
        dropped = torch.zeros_like(loose).scatter(0, order, over).view_as(square)
        return x - x * dropped
