"""ASPO: for good tokens the ratio is turned over, so that those that have fallen weigh more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region, shut
from bandpo.clips.gates import Gate
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Aspo(Gate):
    """Asymmetric importance sampling: 1/r instead of r where A > 0, both truncated.

    c = min(1/r, cap) A where A > 0, min(r, cap) A else;  0 outside and outward

    Args:
        eps_low: margin of the fixed interval below, in [0, 1].
        eps_high: margin of the fixed interval above, >= 0.
        region: any region instead of that interval, or None; the authors' margins go by entropy, which is "archer".
        cap: ceiling of the weight, >= 1.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2510.06062; cap of the authors' code, margin that of their tokens of low entropy.
    """

    name: ClassVar[str] = "aspo"
    paper: ClassVar[str] = "2510.06062"
    cap: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("cap", self.cap, 1.0)

    def gate(self, tokens: Tokens, side: Tensor, region: Region) -> Tensor:
        """Return the truncated weight times A, or 0 outside and outward."""
        turned = torch.where(tokens.advantages > 0, -tokens.log_r, tokens.log_r)
        return shut(torch.exp(turned.clamp(max=math.log(self.cap))) * tokens.advantages, tokens, side)
