"""TOPR: rewarded sequences without a ratio, the others with a ratio of at most 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Topr(Clip):
    """Tapered off-policy REINFORCE: the taper is for what was not rewarded.

    c = A where the reward is positive, clip(r, floor, cap) A else

    Args:
        floor: least weight of the others, in [0, 1].
        cap: greatest weight of the others, >= 0.

    Raises:
        InputError: a value out of its range; later, tokens without rewards.

    Source: arXiv 2503.14286, where the ratio is the whole trajectory's; here it is the token's, as in ROLL, from which
    the values are.
    """

    name: ClassVar[str] = "topr"
    paper: ClassVar[str] = "2503.14286"
    needs: ClassVar[tuple[str, ...]] = ("rewards",)
    uses_p: ClassVar[bool] = False
    floor: float = 0.0
    cap: float = 1.0

    def __post_init__(self) -> None:
        check_number("floor", self.floor, 0.0, 1.0)
        check_number("cap", self.cap, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return A, or the clipped weight times A."""
        least = math.log(self.floor) if self.floor > 0 else -math.inf
        weight = torch.exp(tokens.log_r.clamp(least, math.log(self.cap)))
        return torch.where(tokens.need("rewards", self.name) > 0, tokens.advantages, weight * tokens.advantages)
