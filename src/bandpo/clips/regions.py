"""Regions: sets of allowed ratios. Each is a clip by itself, with PPO's hard gate, and goes into any gate.

To add one, write `bounds` (and `side`, where there is a test cheaper than a root) and add a row to the registry.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import InputError, check_number, check_tensor
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds, band
from bandpo.operator.divergence import Divergence
from bandpo.operator.family import get_divergence
from bandpo.operator.radius import Delta, check_cap, check_delta
from bandpo.operator.tokens import Tokens, above, working_dtype


@dataclass(frozen=True)
class Band(Region):
    """The ratios whose divergence g_f(p, r) is at most delta, and which are at most cap.

    g_f(p, r) = p f(r) + (1-p) f((1-rp)/(1-p)) <= delta

    Args:
        divergence: a name or a `Divergence`.
        delta: divergence radius: a float, a tensor that broadcasts, or a pair (delta_low, delta_high).
        cap: greatest ratio allowed, >= 1, or None. With a cap a token outside need not have left the trust region. The
            paper's runs use 10, which binds for p < .0071 at kl, delta .05.

    Raises:
        InputError: a value out of its range, an unknown divergence.

    Source: arXiv 2603.04918; as a mask 2602.04879 (DPPO), for kl 1901.10314 (TRGPPO).
    """

    name: ClassVar[str] = "band"
    paper: ClassVar[str] = "2603.04918"
    divergence: str | Divergence = "kl"
    delta: Delta = 0.05
    cap: float | None = None

    def __post_init__(self) -> None:
        get_divergence(self.divergence)
        check_delta(self.delta)
        check_cap(self.cap)

    @property
    def measure(self) -> Divergence:
        """The band's own divergence."""
        return get_divergence(self.divergence)

    @property
    def splits(self) -> bool:
        """Not where a radius is a tensor, which has the tokens' shape."""
        return not any(isinstance(side, Tensor) for side in check_delta(self.delta))

    def uncapped(self) -> Region:
        """Return the band by the divergence alone."""
        return self if self.cap is None else dataclasses.replace(self, cap=None)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return `band(log_p, delta, divergence, cap)`."""
        return band(log_p, self.delta, self.divergence, self.cap)

    def side(self, tokens: Tokens) -> Tensor:
        """Return 1 above, -1 below, 0 inside, from g_f alone: nothing is solved."""
        reached = self.measure.of(tokens, digits=False)
        low, high = (d.to(reached) if isinstance(d, Tensor) else d for d in check_delta(self.delta))
        limit = torch.where(tokens.log_r > 0, high, low) if isinstance(self.delta, (tuple, list)) else high
        side = above(reached, limit).copysign_(tokens.log_r)
        return side if self.cap is None else (side + above(tokens.log_r, math.log(self.cap))).clamp_(max=1.0)


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
    paper: ClassVar[str] = "1707.06347"
    uses_p: ClassVar[bool] = False
    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        check_number("eps_low", self.eps_low, 0.0, 1.0)
        check_number("eps_high", self.eps_high, 0.0)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return the same interval for every token."""
        log_low = math.log1p(-self.eps_low) if self.eps_low < 1 else -math.inf
        return constant_bounds(log_p, log_low, math.log1p(self.eps_high))

    def side(self, tokens: Tokens) -> Tensor:
        """Return 1 above, -1 below, 0 inside."""
        return above(tokens.rise, self.eps_high).sub_(above(-tokens.rise, self.eps_low))


@dataclass(frozen=True)
class ClipHigher(Fixed):
    """DAPO's fixed interval, wider above: [1 - 0.2, 1 + 0.28].

    Args:
        eps_low: margin below, in [0, 1].
        eps_high: margin above, >= 0.

    Raises:
        InputError: a margin out of its range.

    Source: arXiv 2503.14476 (DAPO).
    """

    name: ClassVar[str] = "clip_higher"
    paper: ClassVar[str] = "2503.14476"
    eps_high: float = 0.28


@dataclass(frozen=True)
class NoClip(Region):
    """No bound at all: plain importance sampling, c = r A; the arm that every comparison of clips needs."""

    name: ClassVar[str] = "none"
    uses_p: ClassVar[bool] = False

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return (0, largest float) as ratios."""
        return constant_bounds(log_p, -math.inf, math.inf)

    def side(self, tokens: Tokens) -> Tensor:
        """Return 0 for every token."""
        return torch.zeros_like(tokens.log_r)


def check_region(name: str, region: object) -> None:
    """Raise InputError unless `region` is a `Region`."""
    if not isinstance(region, Region):
        raise InputError(
            f"{name}={region!r}: must be a region of ratios; give bandpo.Band(), bandpo.Fixed(), "
            "bandpo.get_clip(name), or in clip_args a name such as 'band' or a mapping such as {'clip': 'band'}"
        )


def constant_bounds(log_p: Tensor, log_low: float, log_high: float) -> Bounds:
    """Return the same bounds for every token; infinities become the largest log-ratios that are floats.

    Args:
        log_p: natural-log probabilities, any shape.
        log_low: log of the least ratio.
        log_high: log of the greatest ratio.

    Returns:
        `Bounds` of the same shape.
    """
    check_tensor("old_logps", log_p)
    dtype = working_dtype(log_p)
    most = torch.finfo(dtype).max
    ends = max(log_low, -most), min(log_high, math.log(most))
    return Bounds(*(torch.full_like(log_p, end, dtype=dtype) for end in ends))
