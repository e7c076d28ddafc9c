"""DRO: no ratio; a pull back in log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Dro(Clip):
    """The gradient of A log pi with a quadratic penalty on the log-ratio.

    c = A - beta log r

    Args:
        beta: weight of the penalty, > 0.

    Raises:
        InputError: beta that is not positive.

    Source: arXiv 2501.12599 (Kimi k1.5); verl has no default, ROLL's is .1.
    """

    name: ClassVar[str] = "dro"
    paper: ClassVar[str] = "2501.12599"
    opposes: ClassVar[bool] = True
    uses_p: ClassVar[bool] = False
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number("beta", self.beta, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return A - beta log r; |log r| counts as at most 1e20."""
        return tokens.advantages - self.beta * tokens.log_r.clamp(-1e20, 1e20)
