"""What an f-divergence is: f, the same with its digits kept, and, where they have a form of their own, its bounds.

Merging all actions but the sampled one leaves two outcomes, Bernoulli(p) and Bernoulli(q), with q = r p, and the trust
region becomes one scalar condition on the ratio r (arXiv 2603.04918):

    g_f(p, r) = p f(r) + (1 - p) f((1 - r p) / (1 - p)) <= delta
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._checks import InputError
from bandpo.arithmetic import expm1
from bandpo.move import LARGE, TINY, Move
from bandpo.shape import SMALLEST, Shape, read_shape

FEW = 4096  # tokens up to which calls cost more than arithmetic


@dataclass(frozen=True, repr=False)
class Divergence:
    """An f-divergence D_f = E_{a ~ old}[f(new(a) / old(a))].

    Only `name` and `f` are needed. The rest keeps digits or saves time where f alone would not.

    Args:
        name: what logs and messages call it.
        f: convex torch function of the ratio u with f(1) = 0, elementwise, finite for 0 < u < inf. The limit f(0) may
            be infinite.
        term: f as a function of (log u, u - 1), which lie apart where u rounds to 1 or to 0.
        series: Taylor coefficients of f at u = 1, from the square up, used by `of` where |u - 1| < `radius`.
        radius: see `series`.
        binary: g_f as a function of a `Move` for the loss, where only the comparison with delta counts.
        bounds: `(log_p, delta_low, delta_high) -> (log_low, log_high)`, the roots of g_f = delta as log-ratios;
            found by `solve` when None.
        narrow: whether `bounds` keeps its digits in float32; otherwise it is given float64.
        shape: what the solver must know of f; read off f, with a check of f, when left out.

    Raises:
        InputError: the name is not a string, or `f` is no function that can be a divergence: not elementwise, not
            convex, f(1) not 0, NaN.

    Source: arXiv 2603.04918, section 3; Csiszar (1967) for the family.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    term: Callable[[Tensor, Tensor], Tensor] | None = None
    series: tuple[float, ...] = ()
    radius: float = 0.1
    binary: Callable[[Move], Tensor] | None = None
    bounds: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    narrow: bool = False
    shape: Shape = Shape(math.nan)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.f):
            raise InputError(
                f"Divergence(name={self.name!r}, f={self.f!r}): name must be a string and f a torch function"
            )
        if math.isnan(self.shape.at_zero):
            object.__setattr__(self, "shape", read_shape(self.name, self.f))

    def __repr__(self) -> str:
        return f"Divergence({self.name!r})"

    def value(self, log_u: Tensor, rise: Tensor, digits: bool = True) -> Tensor:
        """Return f(u), with its digits near u = 1 if `digits`.

        Args:
            log_u: log u, any shape.
            rise: u - 1, same shape.
            digits: whether to take the series near u = 1.

        Returns:
            Tensor of the same shape, >= 0.
        """
        direct = self.plain(torch.exp(log_u), rise) if self.term is None else self.term(log_u, rise)
        if not digits or not self.series:
            return direct
        taylor = torch.full_like(rise, self.series[-1])
        for coefficient in self.series[-2::-1]:
            taylor = taylor.mul_(rise).add_(coefficient)
        return torch.where(rise.abs() < self.radius, taylor * rise * rise, direct)

    def plain(self, u: Tensor, rise: Tensor) -> Tensor:
        """Return f(u) less its tangent at u = 1, for an f that has no `term`.

        Args:
            u: the ratio, >= 0, any shape.
            rise: u - 1, same shape.

        Returns:
            Tensor of the same shape, >= 0.
        """
        value = self.f(u.clamp(min=SMALLEST if u.dtype == torch.float64 else TINY))
        return torch.sub(value, rise, alpha=self.shape.slope) if self.shape.slope else value

    def of(self, move: Move, digits: bool = True) -> Tensor:
        """Return g_f per token in nats (for kl); it may overwrite the scratch tensors of `move`.

        g_f = p f(r) + (1-p) f(1 - x),  x = p (r-1) / (1-p)

        Args:
            move: the tokens' moves.
            digits: whether values far below delta need their digits too, at some price in time.

        Returns:
            Tensor of the tokens' shape; inf where q >= 1 and the divergence has no finite value there.
        """
        if self.binary is not None and not digits:
            return self.binary(move)
        rest = move.rest()
        x = (move.p() * move.rise).div_(rest).clamp_(-LARGE, 1.0)
        other = self.value(torch.log1p(-x).clamp_(min=-LARGE), x.neg_(), digits).mul_(rest)
        return self.value(move.log_ratio, move.rise, digits).mul_(move.p()).add_(other)


def by_tail(
    tail: Callable[[Tensor, Tensor, Tensor], Tensor], shape: Shape | None = None
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the `bounds` of a divergence whose one-sided problem has a solution of its own.

    One side of the band is: an outcome of probability A shrinks by the factor e^-w and the other, of probability
    B = 1 - A, takes up its mass, until the divergence is delta. That is the lower bound with A = p and, by the mirror
    identity, the upper one with A = 1 - p.

    Args:
        tail: `(A, B, delta) -> A w`, where the region reaches the simplex's end inf.
        shape: of f; only its `growth`, `reach` and `far` count, those of kl when None.

    Returns:
        `(log_p, delta_low, delta_high) -> (log_low, log_high)`.
    """
    shape = shape or Shape(math.inf)

    def bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
        floor, rest = floored(log_p, shape.reach)
        p = torch.exp(floor)
        if not torch.compiler.is_compiling() and p.numel() <= FEW:  # both sides at once: half as many calls
            shrink, grow = torch.stack([p, rest]), torch.stack([rest, p])
            low, w = tail(shrink, grow, _pair(delta_low, delta_high, log_p.dim())).div_(shrink).neg_().unbind()
        else:
            low = tail(p, rest, delta_low).div_(p).neg_()
            w = tail(rest, p, delta_high).div_(rest).neg_()
        minus_rise = expm1(w, out=w).mul_(rest).div_(p)
        return low, continued(minus_rise.neg_().log1p_(), floor, log_p, shape)

    return bounds


def _pair(low: Tensor, high: Tensor, dims: int) -> Tensor:
    """Return both radii along a new first dimension, before those of tokens with so many; one radius as it is."""
    if high is low:
        return low
    pair = torch.stack(torch.broadcast_tensors(low, high))  # type: ignore[no-untyped-call]
    return pair.view(2, *(1,) * (dims + 1 - pair.dim()), *pair.shape[1:])


def floored(log_p: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Return log p, at least what the dtype and an f up to e^reach can work with, and 1 - p, at least `TINY`."""
    floor = log_p.clamp(min=-87.0 if log_p.dtype == torch.float32 else -reach)
    return floor, expm1(floor).neg_().clamp_(min=TINY)


def continued(log_high: Tensor, floor: Tensor, log_p: Tensor, shape: Shape) -> Tensor:
    """Return the upper bound at p, given that at e^floor: below it p f(r) is the same for all p.

    The lower bound needs nothing of the kind: its ratio is zero for any use, long before.
    """
    if shape.far is None:  # a power law
        return log_high.add_((floor - log_p).div_(shape.growth))
    far, rest = shape.far(log_high), floor - log_p
    y = torch.add(log_high, rest, alpha=1 / shape.growth)
    for _ in range(2):
        y = y - (y - log_high + shape.far(y) - far - rest) / shape.growth
    return y
