"""Importance sampling, plain or smoothed towards 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class PgIs(Clip):
    """The policy gradient with importance weights, and no bound.

    c = (1 - alpha) r A

    Args:
        alpha: smoothing of the ratio towards 1, in [0, 1). PSPO's surrogate (1 - alpha) r + alpha has just this factor.

    Raises:
        InputError: a value out of its range.

    Source: PSPO, arXiv 2509.21282, has alpha = .1 in a fork's documentation; 0 is plain importance sampling, which is
    also "none".
    """

    name: ClassVar[str] = "pg_is"
    paper: ClassVar[str] = "2509.21282"
    uses_p: ClassVar[bool] = False
    alpha: float = 0.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0, 0.999)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return (1 - alpha) r A."""
        return tokens.weighted * (1 - self.alpha)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return (1 - alpha) A."""
        return tokens.advantages * (1 - self.alpha)
