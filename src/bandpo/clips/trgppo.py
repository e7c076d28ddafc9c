"""TRGPPO: the adaptive range that is Band-KL's interval, found seven years earlier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo.clips.base import Region
from bandpo.clips.regions import Band
from bandpo.operator.band import Bounds
from bandpo.operator.radius import Delta, check_delta
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Trgppo(Region):
    """The ratios whose binary KL is at most delta: `Band` with kl.

    p log(p/q) + (1-p) log((1-p)/(1-q)) <= delta

    The authors' code looks the bounds up in a table over p from .01 to .99, and shrinks them linearly to 1 over
    training; here they are exact for every p and stay.

    Args:
        delta: radius in nats: a float, a tensor that broadcasts, or a pair (delta_low, delta_high).

    Raises:
        InputError: a radius out of its range.

    Source: arXiv 1901.10314; the radius is that of the authors' code for discrete actions.
    """

    name: ClassVar[str] = "trgppo"
    paper: ClassVar[str] = "1901.10314"
    delta: Delta = 0.001

    def __post_init__(self) -> None:
        check_delta(self.delta)

    @property
    def band(self) -> Band:
        """The Band that it is."""
        return Band("kl", self.delta)

    @property
    def splits(self) -> bool:
        """Whether the Band does."""
        return self.band.splits

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return the Band's bounds."""
        return self.band.bounds(log_p)

    def side(self, tokens: Tokens) -> Tensor:
        """Return the Band's side, from the divergence alone."""
        return self.band.side(tokens)
