"""Dual clip: a ratio ceiling for negative advantages, which no bound below 1 confines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip, Region, hard, take_after
from bandpo.clips.gates import Gate
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class DualClip(Gate):
    """PPO's hard gate that also gives no gradient to tokens of negative advantage above a ratio.

    c = r A,  or 0 outside and outward, or 0 where A < 0 and r > cap

    Args:
        eps_low: margin of the fixed interval below, in [0, 1].
        eps_high: margin of the fixed interval above, >= 0.
        region: any region instead of that interval, or None.
        cap: ratio ceiling for A < 0, > 1.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 1912.09729; its 3 is verl's default too. Others use 1 + 2 eps, 4 or 10.
    """

    name: ClassVar[str] = "dual_clip"
    paper: ClassVar[str] = "1912.09729"
    cap: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("cap", self.cap, 1.0, open_low=True)

    def gate(self, tokens: Tokens, side: Tensor, region: Region) -> Tensor:
        """Return the hard gate's c below the ceiling."""
        return below_cap(hard(tokens, side), tokens, self.cap)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A, or 0 where the gate is shut."""
        return below_cap(self.boundary.advantages(tokens), tokens, self.cap)

    def objective(self, tokens: Tokens) -> Tensor:
        """Return min(r A, clip(r) A), for A < 0 at least cap A."""
        return at_least(self.boundary.objective(tokens), tokens, self.cap)


class Dual(Clip):
    """Any other clip under a dual clip: `dual_clip=` of `policy_loss`."""

    def __init__(self, clip: Clip, cap: float) -> None:
        self.clip, self.cap = clip, cap
        take_after(self, clip)
        self.name, self.opposes = clip.name, clip.opposes  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{self.clip!r} with dual_clip={self.cap:g}"

    @property
    def boundary(self) -> Region | None:
        """The region of the inner clip."""
        return self.clip.boundary

    def at(self, progress: float) -> Clip:
        """Return the inner clip at this share of training, under the same ceiling."""
        clip = self.clip.at(progress)
        return self if clip is self.clip else Dual(clip, self.cap)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return the inner clip's c, and 0 where A < 0 and r > cap."""
        return below_cap(self.clip.coefficient(tokens), tokens, self.cap)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return the inner clip's c / r, and 0 where A < 0 and r > cap."""
        return below_cap(self.clip.advantages(tokens), tokens, self.cap)

    def objective(self, tokens: Tokens) -> Tensor:
        """Return the inner objective, for A < 0 at least cap A."""
        return at_least(self.clip.objective(tokens), tokens, self.cap)


def below_cap(x: Tensor, tokens: Tokens, cap: float) -> Tensor:
    """Return `x`, and 0 where A < 0 and r > cap."""
    return x - x * above(tokens.log_r, math.log(cap)) * above(-tokens.advantages, 0.0)


def at_least(objective: Tensor, tokens: Tokens, cap: float) -> Tensor:
    """Return the objective, for A < 0 at least cap A."""
    return torch.where(tokens.advantages < 0, torch.maximum(objective, cap * tokens.advantages), objective)
