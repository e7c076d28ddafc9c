"""RIPO: Band with chi-squared, without the factor 1 - p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds
from bandpo.operator.radius import RADII
from bandpo.operator.tokens import working_dtype


@dataclass(frozen=True)
class Ripo(Region):
    """The ratios within sqrt(delta / p) of 1, and within [floor, cap].

    low = max(1 - sqrt(delta/p), floor),  high = min(1 + sqrt(delta/p), cap)

    Band with chi2 has sqrt(delta (1-p) / p): the same for rare tokens; this one leaves the simplex for likely ones. In
    the original the ratio is cut to [floor, cap] first, which also takes the gradient from tokens beyond that move
    back; here those keep it.

    Args:
        delta: radius of chi-squared, the same on both sides.
        floor: least ratio allowed, in [0, 1].
        cap: greatest ratio allowed, >= 1, or None.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2607.10169; delta and the cut from a third party's test, not from the authors' code.
    """

    name: ClassVar[str] = "ripo"
    paper: ClassVar[str] = "2607.10169"
    delta: float = 0.02
    floor: float = 0.5
    cap: float | None = 10.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)
        check_number("floor", self.floor, 0.0, 1.0)
        if self.cap is not None:
            check_number("cap", self.cap, 1.0)

    def uncapped(self) -> Region:
        """Return the region without its ratio ceiling."""
        return self if self.cap is None else Ripo(self.delta, self.floor, None)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return 1 -+ sqrt(delta / p), cut."""
        log_p = log_p.detach().to(working_dtype(log_p)).nan_to_num(nan=0.0).clamp(min=-80.0, max=0.0)
        width = torch.exp((math.log(self.delta) - log_p) / 2)
        least = math.log(self.floor) if self.floor > 0 else -torch.finfo(log_p.dtype).max
        log_low = torch.log1p(-width.clamp(max=1.0)).clamp(min=least)
        log_high = torch.log1p(width)
        return Bounds(log_low, log_high if self.cap is None else log_high.clamp(max=math.log(self.cap)))
