"""IcePop: importance weights outside an interval count nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.masks import Mask
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class Icepop(Mask):
    """A mask by the ratio itself, for both signs of A.

    c = r A,  or 0 where r < floor or r > cap

    Args:
        floor: least ratio that counts, in [0, 1].
        cap: greatest ratio that counts, >= 1.

    Raises:
        InputError: a value out of its range.

    Source: prime-rl's loss of that name, "icepop@2026-09", the default here; "icepop@verl" is verl's preset, .5 and 5.
    Meant for the ratio of trainer to rollout engine: give the engine's log-probabilities as `old_logps`.
    """

    name: ClassVar[str] = "icepop"
    paper: ClassVar[str] = "prime-rl"
    uses_p: ClassVar[bool] = False
    floor: float = 0.2
    cap: float = 5.0

    def __post_init__(self) -> None:
        check_number("floor", self.floor, 0.0, 1.0)
        check_number("cap", self.cap, 1.0)

    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 where a token is dropped."""
        least = math.log(self.floor) if self.floor > 0 else -math.inf
        dropped = above(tokens.log_r, math.log(self.cap)) + above(-tokens.log_r, -least)
        return x - x * dropped
