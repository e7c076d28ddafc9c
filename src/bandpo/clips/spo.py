"""SPO: a quadratic penalty on the ratio, instead of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Spo(Clip):
    """Simple Policy Optimization, the soft twin of PPO: zero at r = 1 + eps sgn A, restoring beyond.

    c = r A (1 - sgn(A) (r - 1) / eps)

    Args:
        eps: the margin at which the gradient vanishes, > 0.

    Raises:
        InputError: eps that is not positive.

    Source: arXiv 2401.16025, loss -A r + |A| (r-1)^2 / (2 eps); .2 is the margin it takes from PPO.
    """

    name: ClassVar[str] = "spo"
    paper: ClassVar[str] = "2401.16025"
    opposes: ClassVar[bool] = True
    uses_p: ClassVar[bool] = False
    eps: float = 0.2

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A times the factor; r counts as at most e^20, so that its square stays finite."""
        return self.advantages(tokens) * tokens.ratio.clamp(max=4.85e8)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A times the factor."""
        return tokens.advantages - tokens.advantages.abs() * (tokens.rise.clamp(max=4.85e8) / self.eps)
