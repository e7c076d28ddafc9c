"""DCPO: bounds that widen for rare tokens, from one of the two terms of binary chi-squared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds
from bandpo.operator.tokens import TINY, working_dtype


@dataclass(frozen=True)
class Dcpo(Region):
    """Dynamic adaptive clipping: the ratios with q |r - 1| at most eps.

    low = 1/2 + sqrt(max(1 - 4 eps_low / p, 0)) / 2,  high = min(1/2 + sqrt(1 + 4 eps_high / p) / 2, cap)

    That is the taken token's term of chi2(new, old) = p (r - 1)^2 / (1 - p); the others' is missing, so the upper bound
    leaves the simplex for p > 1 / (1 + eps_high), and the lower one is never below 1/2.

    Args:
        eps_low: margin in probability below, in [0, 1].
        eps_high: margin in probability above, in [0, 1].
        cap: greatest ratio allowed, >= 1, or None.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2509.02333; margins of the authors' scripts (their README says .16 and .2, as BandPO's baseline has),
    cap of their code. Its smoothed advantages are no part of the clip and are left out.
    """

    name: ClassVar[str] = "dcpo"
    paper: ClassVar[str] = "2509.02333"
    eps_low: float = 0.2
    eps_high: float = 0.28
    cap: float | None = 10.0

    def __post_init__(self) -> None:
        check_number("eps_low", self.eps_low, 0.0, 1.0)
        check_number("eps_high", self.eps_high, 0.0, 1.0)
        if self.cap is not None:
            check_number("cap", self.cap, 1.0)

    def uncapped(self) -> Region:
        """Return the region without its ratio ceiling."""
        return self if self.cap is None else Dcpo(self.eps_low, self.eps_high, None)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return the two roots."""
        log_p = log_p.detach().to(working_dtype(log_p)).nan_to_num(nan=0.0).clamp(min=-80.0, max=0.0)
        p = torch.exp(log_p).clamp(min=TINY)
        low = 0.5 + (1 - 4 * self.eps_low / p).clamp(min=0.0).sqrt() / 2
        rise = (1 + 4 * self.eps_high / p).sqrt() / 2 - 0.5
        log_high = torch.log1p(rise)
        return Bounds(torch.log(low), log_high if self.cap is None else log_high.clamp(max=math.log(self.cap)))
