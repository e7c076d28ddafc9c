"""GMPO: the geometric mean of a sequence's clipped ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import MOST, Clip
from bandpo.operator.sequences import sequence_mean
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Gmpo(Clip):
    """A ratio for each sequence, made of token ratios that are clipped one by one, in log space.

    c = s A,  or 0 where (A > 0 and log r > eps_high) or (A < 0 and log r < -eps_low),  s = exp(mean_t clipped log r_t)

    Args:
        eps_low: margin of log r below, > 0.
        eps_high: margin of log r above, > 0.

    Raises:
        InputError: a margin out of its range; later, tokens that are no (batch, token).

    Source: arXiv 2507.20673; margin of the authors' code. Its mean over sequences is the normaliser's:
    seq-mean-token-mean.
    """

    name: ClassVar[str] = "gmpo"
    paper: ClassVar[str] = "2507.20673"
    looks_at: ClassVar[str] = "sequence"
    uses_p: ClassVar[bool] = False
    eps_low: float = 0.4
    eps_high: float = 0.4

    def __post_init__(self) -> None:
        check_number("eps_low", self.eps_low, 0.0, open_low=True)
        check_number("eps_high", self.eps_high, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return s A, or 0 where the token's own ratio is clipped."""
        log_r, a = tokens.log_r.clamp(-1e6, 1e6), tokens.advantages
        clipped = ((a > 0) & (log_r > self.eps_high)) | ((a < 0) & (log_r < -self.eps_low))
        inner = torch.where(clipped, log_r.clamp(-self.eps_low, self.eps_high), log_r)
        log_s = sequence_mean(inner, tokens).clamp(-MOST, MOST)
        return torch.where(clipped, 0.0, torch.exp(log_s) * a)
