"""ATR-GRPO: KL's f without p: a fixed interval of the ratio, wider above than below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region
from bandpo.clips.regions import constant_bounds
from bandpo.operator.band import Bounds


@dataclass(frozen=True)
class Atr(Region):
    """The ratios whose k3 estimate of KL is at most delta.

    r - 1 - log r <= delta

    The same f as Band with kl, but neither weighed by p nor with the others' part: the interval is the same for every
    probability, [.716, 1.350] for .05.

    Args:
        delta: radius in nats, > 0.

    Raises:
        InputError: a radius that is not positive.

    Source: arXiv 2602.05494; only its abstract was read, the radius is ours: that of BandPO.
    """

    name: ClassVar[str] = "atr"
    paper: ClassVar[str] = "2602.05494"
    uses_p: ClassVar[bool] = False
    delta: float = 0.05

    def __post_init__(self) -> None:
        check_number("delta", self.delta, 1e-8, 1e4)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return both roots, the same for every token."""
        return constant_bounds(log_p, _root(self.delta, -1.0), _root(self.delta, 1.0))


def _root(delta: float, side: float) -> float:
    """Return the root x of  e^x - 1 - x = delta  on one side of 0, by Newton's method from without."""
    x = -delta - 1.0 if side < 0 else math.sqrt(2 * delta) if delta < 0.5 else math.log1p(2 * delta) + 1.0
    for _ in range(60):
        slope = math.expm1(x)
        x -= (slope - x - delta) / slope
    return x
