"""GSPO: one ratio for each sequence, the geometric mean of its tokens' ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import MOST, Clip
from bandpo.operator.sequences import sequence_mean
from bandpo.operator.tokens import Tokens, above, expm1


@dataclass(frozen=True)
class Gspo(Clip):
    """PPO's hard gate on the ratio of the sequence.

    c = s A,  or 0 where (A > 0 and s > 1 + eps_high) or (A < 0 and s < 1 - eps_low),  s = exp(mean_t log r_t)

    Args:
        eps_low: margin of s below, in [0, 1].
        eps_high: margin of s above, >= 0.

    Raises:
        InputError: a margin out of its range; later, tokens that are no (batch, token).

    Source: arXiv 2507.18071. LUSPO (2602.05261) is this c under a normaliser that weighs sequences by their length.
    """

    name: ClassVar[str] = "gspo"
    paper: ClassVar[str] = "2507.18071"
    uses_p: ClassVar[bool] = False
    looks_at: ClassVar[str] = "sequence"
    eps_low: float = 3e-4
    eps_high: float = 4e-4

    def __post_init__(self) -> None:
        check_number("eps_low", self.eps_low, 0.0, 1.0)
        check_number("eps_high", self.eps_high, 0.0)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return s A, or 0 outside and outward."""
        log_s = sequence_mean(tokens.log_r, tokens).clamp(-MOST, MOST)
        side = above(expm1(log_s), self.eps_high) - above(-expm1(log_s), self.eps_low)
        weighted = torch.exp(log_s) * tokens.advantages
        return weighted - weighted * above(side * tokens.advantages, 0.0)
