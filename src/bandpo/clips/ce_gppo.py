"""CE-GPPO: outside the interval a token keeps the gradient that it had at the bound, weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region
from bandpo.clips.dual_clip import below_cap
from bandpo.clips.gates import Gate
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class CeGppo(Gate):
    """Outside and outward the ratio is that of the bound, and the gradient stays, times a factor a side.

    c = r A,  or beta_low low A where A < 0 and r < low,  or beta_high high A where A > 0 and r > high;  0 where A < 0
    and r > cap

    Args:
        eps_low: margin of the fixed interval below, in [0, 1].
        eps_high: margin of the fixed interval above, >= 0.
        region: any region instead of that interval, or None.
        beta_low: weight below, >= 0.
        beta_high: weight above, >= 0.
        cap: dual clip, > 1, or None.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2509.20712; weights of the authors' scripts for their 7B model (.5 below for 1.5B), cap verl's.
    """

    name: ClassVar[str] = "ce_gppo"
    paper: ClassVar[str] = "2509.20712"
    beta_low: float = 0.75
    beta_high: float = 1.0
    cap: float | None = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta_low", self.beta_low, 0.0)
        check_number("beta_high", self.beta_high, 0.0)
        if self.cap is not None:
            check_number("cap", self.cap, 1.0, open_low=True)

    def gate(self, tokens: Tokens, side: Tensor, region: Region) -> Tensor:
        """Return r A, or the bound's, weighed."""
        bounds = region.limits(tokens)
        edge = torch.where(side > 0, self.beta_high * bounds.high.clamp(max=1e30), self.beta_low * bounds.low)
        outward = side * tokens.advantages > 0
        c = torch.where(outward, edge * tokens.advantages, tokens.weighted)
        return c if self.cap is None else below_cap(c, tokens, self.cap)
