"""BAPO: an interval that is widened, batch by batch, until gains weigh as much as losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import InputError, check_number
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Bapo(Region):
    """A fixed interval chosen anew for each batch: first the lower bound is raised, then the upper one.

    The first (low, high) of a list for which  P / (P + N) >= share,  where  P = sum of min(r, high) A over A > 0,
    N = sum of max(r, low) |A| over A < 0;  the list goes from the first margins to the last, low first, in steps

    A higher low only raises N, so the search goes past the lower bounds either not at all or to their end, as in the
    authors' code.

    Args:
        eps_low: first and last margin below, in [0, 1], falling.
        eps_high: first and last margin above, >= 0, rising.
        share: what the gains are to weigh, in (0, 1).
        step: of both margins, > 0.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2510.18927; values of the authors' yaml (README: low .6 to .9, high 1.2 to 3.0). In a host the batch
    is a micro-batch on one rank; the authors sum over ranks. Their dual clip of 3 is left out: give `dual_clip=3` to
    `policy_loss`.
    """

    name: ClassVar[str] = "bapo"
    paper: ClassVar[str] = "2510.18927"
    looks_at: ClassVar[str] = "batch"
    uses_p: ClassVar[bool] = False
    as_bounds: ClassVar[bool] = False
    eps_low: tuple[float, float] = (0.4, 0.2)
    eps_high: tuple[float, float] = (0.2, 1.0)
    share: float = 0.5
    step: float = 0.05

    def __post_init__(self) -> None:
        for name, most in (("eps_low", 1.0), ("eps_high", math.inf)):
            ends = getattr(self, name)
            if not isinstance(ends, (tuple, list)) or len(ends) != 2:
                raise InputError(f"{name}={ends!r}: must be the first and the last margin, as in (0.4, 0.2)")
            for end in ends:
                check_number(name, end, 0.0, most)
            object.__setattr__(self, name, tuple(ends))  # a recipe has lists, which cannot be hashed
        check_number("share", self.share, 0.0, 1.0, open_low=True)
        check_number("step", self.step, 0.0, open_low=True)

    def intervals(self) -> list[tuple[float, float]]:
        """Return the (low, high) that are tried, in their order."""
        lows = _steps(1 - self.eps_low[0], 1 - self.eps_low[1], self.step)
        highs = _steps(1 + self.eps_high[0], 1 + self.eps_high[1], self.step)
        return [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs[1:]]

    def bounds(self, log_p: Tensor) -> Bounds:
        """Raise: the bounds hang on the batch, not on log p."""
        raise InputError("clip 'bapo' has no bounds by probability: they hang on the batch; use limits(tokens)")

    def limits(self, tokens: Tokens) -> Bounds:
        """Return the interval that this batch gets, for every token."""
        intervals = self.intervals()
        tried = tokens.log_r.new_tensor(intervals)
        ratio, up, down = tokens.ratio, tokens.advantages.clamp(min=0.0), tokens.advantages.clamp(max=0.0)
        gain = torch.stack([(ratio.clamp(max=high) * up).sum() for _, high in intervals])
        loss = torch.stack([(ratio.clamp(min=low) * down).sum().neg() for low, _ in intervals])
        enough = gain * (1 - self.share) >= loss * self.share
        last = torch.arange(len(tried), device=tried.device) == len(tried) - 1
        first = (enough | last).to(torch.int8).argmax()  # of several equal ones the first
        chosen = torch.log(tried.index_select(0, first[None])[0].clamp(min=1e-30))
        return Bounds(chosen[0].expand_as(tokens.log_r), chosen[1].expand_as(tokens.log_r))


def _steps(start: float, end: float, step: float) -> list[float]:
    count = max(math.ceil((end - start) / step - 1e-9), 0)
    return [min(start + i * step, end) for i in range(count + 1)]
