"""Regions made of regions: one per side, a union, an intersection, a ceiling."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region, take_after
from bandpo.clips.regions import Band, Fixed, check_region
from bandpo.operator.band import Bounds
from bandpo.operator.divergence import Divergence
from bandpo.operator.tokens import Tokens, above


class Composed(Region):
    """A region made of others."""

    @abstractmethod
    def compose(self, of: Callable[[Region], Bounds]) -> Bounds:
        """Return the bounds; `of` gives those of a part."""

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return the bounds, made of the parts'."""
        return self.compose(lambda part: part.bounds(log_p))

    def limits(self, tokens: Tokens) -> Bounds:
        """Return the bounds of these tokens, made of the parts'."""
        return self.compose(lambda part: part.limits(tokens))


@dataclass(frozen=True)
class Sides(Composed):
    """One region per side: `high` bounds the rise of a token's probability, `low` its fall.

    The defaults give a token more room to rise than to fall: Band (kl, 0.05) above, PPO's 0.2 below. In a recipe each
    side is a name or a mapping: ``{high: {clip: band, delta: 0.05}, low: {clip: fixed, eps_low: 0.2}}``.

    Args:
        high: the region that gives the upper bounds.
        low: the region that gives the lower bounds.

    Raises:
        InputError: an argument that is not a region.
    """

    name: ClassVar[str] = "sides"
    high: Region = Band()
    low: Region = Fixed(eps_low=0.2)

    def __post_init__(self) -> None:
        for side in ("high", "low"):
            check_region(side, getattr(self, side))
        take_after(self, self.high, self.low)

    @property
    def measure(self) -> Divergence:
        """The divergence of the upper side."""
        return self.high.measure

    @property
    def splits(self) -> bool:
        """Whether both sides do."""
        return self.high.splits and self.low.splits

    def uncapped(self) -> Region:
        """Return both sides without their ratio ceilings."""
        return Sides(self.high.uncapped(), self.low.uncapped())

    def compose(self, of: Callable[[Region], Bounds]) -> Bounds:
        """Return the upper bounds of `high` and the lower bounds of `low`."""
        return Bounds(of(self.low).log_low, of(self.high).log_high)

    def side(self, tokens: Tokens) -> Tensor:
        """Return 1 above `high`, -1 below `low`, 0 inside."""
        return self.high.side(tokens).clamp(min=0.0) + self.low.side(tokens).clamp(max=0.0)


@dataclass(frozen=True)
class _Pair(Composed):
    """Two regions that become one.

    Args:
        first: a region; its divergence is the measure.
        second: another region.
    """

    first: Region = Band()
    second: Region = Fixed()

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            check_region(name, getattr(self, name))
        take_after(self, self.first, self.second)

    @property
    def measure(self) -> Divergence:
        """The divergence of the first region."""
        return self.first.measure

    @property
    def splits(self) -> bool:
        """Whether both do."""
        return self.first.splits and self.second.splits


@dataclass(frozen=True)
class Union(_Pair):
    """The ratios that either of two regions allows; with `Fixed` the authors' "relax" of Band.

    low = min(low_1, low_2),  high = max(high_1, high_2)

    Args:
        first: a region; its divergence is the measure.
        second: another region.

    Raises:
        InputError: an argument that is not a region.

    Source: an option of arXiv 2603.04918 for Band and [1 - eps, 1 + eps], off in its main runs.
    """

    name: ClassVar[str] = "union"
    paper: ClassVar[str] = "2603.04918"

    def compose(self, of: Callable[[Region], Bounds]) -> Bounds:
        """Return the lower of the lower bounds and the higher of the upper ones."""
        a, b = of(self.first), of(self.second)
        return Bounds(torch.minimum(a.log_low, b.log_low), torch.maximum(a.log_high, b.log_high))

    def side(self, tokens: Tokens) -> Tensor:
        """Return 1 above both, -1 below both, 0 inside either."""
        a, b = self.first.side(tokens), self.second.side(tokens)
        return torch.minimum(a, b).clamp(min=0.0) + torch.maximum(a, b).clamp(max=0.0)


@dataclass(frozen=True)
class Intersection(_Pair):
    """The ratios that both of two regions allow.

    low = max(low_1, low_2),  high = min(high_1, high_2)

    Args:
        first: a region; its divergence is the measure.
        second: another region.

    Raises:
        InputError: an argument that is not a region.
    """

    name: ClassVar[str] = "intersection"

    def compose(self, of: Callable[[Region], Bounds]) -> Bounds:
        """Return the higher of the lower bounds and the lower of the upper ones."""
        a, b = of(self.first), of(self.second)
        return Bounds(torch.maximum(a.log_low, b.log_low), torch.minimum(a.log_high, b.log_high))

    def side(self, tokens: Tokens) -> Tensor:
        """Return 1 above either, -1 below either, 0 inside both."""
        a, b = self.first.side(tokens), self.second.side(tokens)
        return torch.maximum(a, b).clamp(min=0.0) + torch.minimum(a, b).clamp(max=0.0)


@dataclass(frozen=True)
class Capped(Composed):
    """A region with a ceiling of the ratio, as Band has one of its own.

    high = min(high, cap)

    Args:
        region: the region.
        cap: greatest ratio allowed, >= 1; 10 is that of BandPO's runs.

    Raises:
        InputError: an argument that is not a region, a cap below 1.

    Source: arXiv 2603.04918 for Band.
    """

    name: ClassVar[str] = "capped"
    paper: ClassVar[str] = "2603.04918"
    region: Region = Band()  # type: ignore[assignment]  # the inner one; statistics take this one as it is
    cap: float = 10.0

    def __post_init__(self) -> None:
        check_region("region", self.region)
        check_number("cap", self.cap, 1.0)
        take_after(self, self.region)

    @property
    def measure(self) -> Divergence:
        """The divergence of the region."""
        return self.region.measure

    @property
    def splits(self) -> bool:
        """Whether the region does."""
        return self.region.splits

    def uncapped(self) -> Region:
        """Return the region without any ceiling."""
        return self.region.uncapped()

    def compose(self, of: Callable[[Region], Bounds]) -> Bounds:
        """Return the region's bounds, the upper ones at most the cap."""
        inner = of(self.region)
        return Bounds(inner.log_low, inner.log_high.clamp(max=math.log(self.cap)))

    def side(self, tokens: Tokens) -> Tensor:
        """Return the region's side, and 1 past the cap."""
        return (self.region.side(tokens) + above(tokens.log_r, math.log(self.cap))).clamp(max=1.0)
