"""The clips: a region of ratios per token. PPO's rule takes the gradient from a token outside that moves outward.

A region answers two questions: its bounds, as log-ratios (hosts clamp with them), and on which side a token is outside
(the loss needs no root for that: arXiv 2602.04879, 1901.10314). To add a clip, write a `Region` and add it to `CLIPS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bandpo._checks import InputError, check_keywords, check_number, check_tensor, nearest
from bandpo.bounds import Bounds, Delta, band, check_cap, check_delta
from bandpo.divergences import Divergence
from bandpo.family import get_divergence
from bandpo.move import Move, above, working_dtype


class Region:
    """A set of allowed ratios for each token; the base of every clip."""

    name: ClassVar[str]

    @property
    def measure(self) -> Divergence:
        """The divergence in which metrics say how far tokens went; kl unless the region has its own."""
        return get_divergence("kl")

    def bounds(self, old_logps: Tensor) -> Bounds:
        """Return the least and the greatest ratio allowed for each token.

        Args:
            old_logps: natural-log probabilities under the old policy, any shape.

        Returns:
            `Bounds` of the same shape, detached.
        """
        raise NotImplementedError

    def outside(self, move: Move, want_reached: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return on which side of the region each token is, and the divergence that it has reached.

        Args:
            move: the tokens' moves; its scratch tensors may be overwritten.
            want_reached: whether the divergence is wanted although the side may not need it.

        Returns:
            Float tensor of the tokens' shape: 1 above, -1 below, 0 inside; and the divergence in `measure`, or None.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Band(Region):
    """The ratios whose divergence g_f(p, r) is at most delta, and which are at most cap.

    Args:
        divergence: a name or a `Divergence`.
        delta: divergence radius: a float, a tensor that broadcasts, or a pair (delta_low, delta_high).
        cap: greatest ratio allowed, >= 1, or None. The paper's runs use 10, which binds for p < .0071 at kl, delta .05.

    Raises:
        InputError: a value out of its range, an unknown divergence.

    Source: arXiv 2603.04918; as a mask 2602.04879 (DPPO), for kl 1901.10314 (TRGPPO).
    """

    name: ClassVar[str] = "band"
    divergence: str | Divergence = "kl"
    delta: Delta = 0.05
    cap: float | None = 10.0

    def __post_init__(self) -> None:
        get_divergence(self.divergence)
        check_delta(self.delta)
        check_cap(self.cap)

    @property
    def measure(self) -> Divergence:
        """The band's own divergence."""
        return get_divergence(self.divergence)

    def bounds(self, old_logps: Tensor) -> Bounds:
        """Return `band(old_logps, delta, divergence, cap)`."""
        return band(old_logps, self.delta, self.divergence, self.cap)

    def outside(self, move: Move, want_reached: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return 1 above, -1 below, 0 inside, and the divergence; solves nothing."""
        reached = self.measure.of(move, digits=False)
        del move.log_ratio, move.rise  # spent: four tensors are alive at most
        log_ratio = move.raw_log_ratio()  # only its side is used, and padding has no value that a side could change
        low, high = check_delta(self.delta)
        out = above(reached, high) if low is high else _above_by_side(reached, log_ratio, low, high)
        torch.copysign(out, log_ratio, out=out)
        if self.cap is not None:
            out.add_(log_ratio.gt_(math.log(self.cap))).clamp_(max=1.0)
        return out, reached


@dataclass(frozen=True)
class Fixed(Region):
    """PPO's fixed interval [1 - eps_low, 1 + eps_high]; Clip-Higher is Fixed(0.2, 0.28).

    Args:
        eps_low: margin below, in [0, 1].
        eps_high: margin above, >= 0.

    Raises:
        InputError: a margin out of its range.

    Source: arXiv 1707.06347 (PPO), 2503.14476 (Clip-Higher).
    """

    name: ClassVar[str] = "fixed"
    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        check_number("eps_low", self.eps_low, 0.0, 1.0)
        check_number("eps_high", self.eps_high, 0.0)

    def bounds(self, old_logps: Tensor) -> Bounds:
        """Return the same interval for every token."""
        check_tensor("old_logps", old_logps)
        dtype = working_dtype(old_logps)
        log_low = math.log1p(-self.eps_low) if self.eps_low < 1 else -torch.finfo(dtype).max
        ends = log_low, math.log1p(self.eps_high)
        return Bounds(*(torch.full_like(old_logps, end, dtype=dtype) for end in ends))

    def outside(self, move: Move, want_reached: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return 1 above, -1 below, 0 inside, and the divergence if wanted."""
        out = above(move.rise, self.eps_high).sub_(above(-move.rise, self.eps_low))
        return out, self.measure.of(move, digits=False) if want_reached else None


@dataclass(frozen=True)
class NoClip(Region):
    """No bound at all: plain importance sampling, the arm that every comparison of clips needs."""

    name: ClassVar[str] = "none"

    def bounds(self, old_logps: Tensor) -> Bounds:
        """Return (0, largest float) as ratios."""
        check_tensor("old_logps", old_logps)
        dtype = working_dtype(old_logps)
        largest = torch.finfo(dtype).max
        return Bounds(*(torch.full_like(old_logps, end, dtype=dtype) for end in (-largest, math.log(largest))))

    def outside(self, move: Move, want_reached: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return 0 for every token, and the divergence if wanted."""
        return torch.zeros_like(move.rise), self.measure.of(move, digits=False) if want_reached else None


@dataclass(frozen=True)
class Sides(Region):
    """One region per side: `high` bounds the rise of a token's probability, `low` its fall.

    Args:
        high: the region that gives the upper bounds.
        low: the region that gives the lower bounds.

    Raises:
        InputError: an argument that is not a clip.
    """

    name: ClassVar[str] = "sides"
    high: Region
    low: Region

    def __post_init__(self) -> None:
        for side in ("high", "low"):
            if not isinstance(getattr(self, side), Region):
                raise InputError(
                    f"{side}={getattr(self, side)!r}: must be a clip; give bandpo.Band() or bandpo.Fixed()"
                )

    @property
    def measure(self) -> Divergence:
        """The divergence of the upper side."""
        return self.high.measure

    def bounds(self, old_logps: Tensor) -> Bounds:
        """Return the upper bounds of `high` and the lower bounds of `low`."""
        return Bounds(self.low.bounds(old_logps).log_low, self.high.bounds(old_logps).log_high)

    def outside(self, move: Move, want_reached: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return 1 above `high`, -1 below `low`, 0 inside, and the divergence of `high` if it is there or wanted."""
        below, _ = self.low.outside(move.again())
        out, reached = self.high.outside(move, want_reached)
        return out.clamp_(min=0.0).add_(below.clamp_(max=0.0)), reached


def _above_by_side(reached: Tensor, log_ratio: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    rising = above(log_ratio, 0.0)
    return above(reached, high).mul_(rising).add_(above(reached, low).mul_(1 - rising))


CLIPS: dict[str, Callable[..., Region]] = {
    "band": Band,
    "fixed": Fixed,
    "clip-higher": lambda eps_low=0.2, eps_high=0.28: Fixed(eps_low, eps_high),
    "none": NoClip,
    "sides": Sides,
}


def get_clip(clip: str | Region, **clip_args: Any) -> Region:
    """Return the clip of that name, made with those arguments; a clip is returned as it is.

    Args:
        clip: a name in `CLIPS`, or a clip.
        **clip_args: the arguments of the clip's class.

    Returns:
        The clip.

    Raises:
        InputError: an unknown name or argument (the nearest one is named), or a value out of its range.
    """
    if isinstance(clip, Region):
        if clip_args:
            raise InputError(
                f"clip_args={clip_args!r} with a clip that is made already: give them to {type(clip).__name__}()"
            )
        return clip
    if clip not in CLIPS:
        raise InputError(f"clip={clip!r}: must be one of {', '.join(CLIPS)}{nearest(clip, CLIPS)}")
    check_keywords(f"clip {clip!r}", CLIPS[clip], clip_args)
    return CLIPS[clip](**clip_args)
