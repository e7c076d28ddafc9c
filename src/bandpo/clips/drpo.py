"""DRPO: a quadratic penalty on the move of probability, instead of a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Drpo(Clip):
    """The soft twin of DPPO-TV: zero where q - p = eps sgn A, restoring beyond.

    c = r A (1 - sgn(A) (q - p) / eps)

    Args:
        eps: the move of probability at which the gradient vanishes, > 0.

    Raises:
        InputError: eps that is not positive.

    Source: arXiv 2606.09821, loss -A r + |A| p (r-1)^2 / (2 eps). 12.5 is the value in public code; as |q - p| <= 1 it
    leaves a factor within [.92, 1.08], that is nearly no trust region.
    """

    name: ClassVar[str] = "drpo"
    paper: ClassVar[str] = "2606.09821"
    opposes: ClassVar[bool] = True
    eps: float = 12.5

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A times the factor."""
        return self.advantages(tokens) * tokens.ratio

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A times the factor."""
        return tokens.advantages - tokens.advantages.abs() * (tokens.moved / self.eps)
