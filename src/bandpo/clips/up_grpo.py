"""UP-GRPO: for good tokens plain REINFORCE, unbounded; for the others GRPO's clip below and a dual clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip, hard
from bandpo.clips.dual_clip import below_cap
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class UpGrpo(Clip):
    """Unbounded positive asymmetric optimization: where A > 0 the ratio is that of the policy to itself, which is 1.

    c = A where A > 0;  r A else, or 0 where r < 1 - eps_low or r > cap

    Args:
        eps_low: margin below for A <= 0, in [0, 1].
        cap: ratio ceiling for A <= 0, > 1.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2607.06987, equation 15; margin and cap are verl's, where pull request 7022 adds it as "up".
    """

    name: ClassVar[str] = "up_grpo"
    paper: ClassVar[str] = "2607.06987"
    uses_p: ClassVar[bool] = False
    eps_low: float = 0.2
    cap: float = 3.0

    def __post_init__(self) -> None:
        check_number("eps_low", self.eps_low, 0.0, 1.0)
        check_number("cap", self.cap, 1.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return A, or r A between the margin and the ceiling."""
        gated = below_cap(hard(tokens, -above(-tokens.rise, self.eps_low)), tokens, self.cap)
        return torch.where(tokens.advantages > 0, tokens.advantages, gated)
