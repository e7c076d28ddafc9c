"""What an f-divergence is: f, the same with its digits kept, and, where they have a form of their own, its bounds.

Merging all actions but the sampled one leaves two outcomes, Bernoulli(p) and Bernoulli(q), with q = r p, and the trust
region becomes one scalar condition on the ratio r (arXiv 2603.04918):

    g_f(p, r) = p f(r) + (1 - p) f((1 - r p) / (1 - p)) <= delta
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._checks import InputError
from bandpo.move import LARGE, TINY, Move, expm1


@dataclass(frozen=True)
class Divergence:
    """An f-divergence D_f = E_{a ~ old}[f(new(a) / old(a))].

    Only `name` and `f` are needed. The rest keeps digits or saves time where f alone would not.

    Args:
        name: what logs and messages call it.
        f: convex torch function of the ratio u with f(1) = 0, elementwise.
        term: f as a function of (log u, u - 1), which lie apart where u rounds to 1 or to 0.
        series: Taylor coefficients of f at u = 1, from the square up, used by `of` where |u - 1| < `radius`.
        radius: see `series`.
        fast: g_f as a function of a `Move` for the loss, where only the comparison with delta counts.
        bounds: `(log_p, delta_low, delta_high) -> (log_low, log_high)`, the roots of g_f = delta as log-ratios;
            found by bracketing when None.

    Raises:
        InputError: `f` is not callable or the name is not a string.

    Source: arXiv 2603.04918, section 3; Csiszar (1967) for the family.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    term: Callable[[Tensor, Tensor], Tensor] | None = None
    series: tuple[float, ...] = ()
    radius: float = 0.1
    fast: Callable[[Move], Tensor] | None = None
    bounds: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.f):
            raise InputError(
                f"Divergence(name={self.name!r}, f={self.f!r}): name must be a string and f a torch function"
            )

    def value(self, log_u: Tensor, rise: Tensor, digits: bool = True) -> Tensor:
        """Return f(u), with its digits near u = 1 if `digits`.

        Args:
            log_u: log u, any shape.
            rise: u - 1, same shape.
            digits: whether to take the series near u = 1.

        Returns:
            Tensor of the same shape, >= 0.
        """
        direct = self.f(1 + rise) if self.term is None else self.term(log_u, rise)
        if not digits or not self.series:
            return direct
        taylor = torch.full_like(rise, self.series[-1])
        for coefficient in self.series[-2::-1]:
            taylor = taylor.mul_(rise).add_(coefficient)
        return torch.where(rise.abs() < self.radius, taylor * rise * rise, direct)

    def of(self, move: Move, digits: bool = True) -> Tensor:
        """Return g_f per token in nats (for kl); it may overwrite the scratch tensors of `move`.

        g_f = p f(r) + (1-p) f(1 - x),  x = p (r-1) / (1-p)

        Args:
            move: the tokens' moves.
            digits: whether values far below delta need their digits too, at some price in time.

        Returns:
            Tensor of the tokens' shape; inf where q >= 1 and the divergence has no finite value there.
        """
        if self.fast is not None and not digits:
            return self.fast(move)
        rest = move.rest()
        x = (move.p() * move.rise).div_(rest).clamp_(-LARGE, 1.0)
        other = self.value(torch.log1p(-x).clamp_(min=-LARGE), x.neg_(), digits).mul_(rest)
        return self.value(move.log_ratio, move.rise, digits).mul_(move.p()).add_(other)


def by_tail(tail: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the `bounds` of a divergence whose one-sided problem has a solution of its own.

    One side of the band is: an outcome of probability A shrinks by the factor e^-w and the other, of probability
    B = 1 - A, takes up the mass. The lower bound is (A, B) = (p, 1-p) with log r = -w; by the mirror identity
    r_low(p) = (1 - (1-p) r_high(1-p)) / p the upper bound is (A, B) = (1-p, p).

    Args:
        tail: `(A, B, delta) -> A w`, which stays finite as A -> 0; inf where the region reaches the simplex's end.

    Returns:
        `(log_p, delta_low, delta_high) -> (log_low, log_high)`.
    """

    def bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
        # Below p = e^-87 (float32) the upper bound is a constant / p, so the rest of log p is added at the end, and
        # r_low is zero for any use: it saturates.
        floor = log_p.clamp(min=-87.0 if log_p.dtype == torch.float32 else -700.0)
        p, rest = torch.exp(floor), expm1(floor).neg_().clamp_(min=TINY)
        low = tail(p, rest, delta_low).div_(p).neg_()
        w = tail(rest, p, delta_high).div_(rest).neg_()
        minus_rise = expm1(w, out=w).mul_(rest).div_(p)
        return low, minus_rise.neg_().log1p_().add_(floor).sub_(log_p)

    return bounds
