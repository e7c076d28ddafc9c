"""DGPO: outside its region a token's gradient decays, and never vanishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region
from bandpo.clips.gates import Gate
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Dgpo(Gate):
    """Decoupled decay outside a region: as a power of how far outside the token is.

    c = r A,  or r (r / low)^n A where A < 0 and r < low,  or r (high / r)^(1/m) A where A > 0 and r > high

    Args:
        eps_low: margin of the fixed interval below, in [0, 1].
        eps_high: margin of the fixed interval above, >= 0.
        region: any region instead of that interval, or None.
        n: power of the decay below, > 0.
        m: inverse power of the decay above, > 0.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2603.14389; n and m of the authors' code (for their 1.5B model n = 2), margins PPO's.
    """

    name: ClassVar[str] = "dgpo"
    paper: ClassVar[str] = "2603.14389"
    n: float = 1.0
    m: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("n", self.n, 0.0, open_low=True)
        check_number("m", self.m, 0.0, open_low=True)

    def gate(self, tokens: Tokens, side: Tensor, region: Region) -> Tensor:
        """Return r A times the decay."""
        bounds = region.limits(tokens)
        below, beyond = (tokens.log_r - bounds.log_low) * self.n, (bounds.log_high - tokens.log_r) / self.m
        decay = torch.where(side > 0, beyond, below).clamp(max=0.0)
        outward = side * tokens.advantages > 0
        return tokens.weighted * torch.exp(torch.where(outward, decay, 0.0))
