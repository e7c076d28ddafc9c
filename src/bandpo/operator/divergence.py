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

from bandpo._input import InputError
from bandpo.operator.shape import SMALLEST, Shape, read_shape
from bandpo.operator.tokens import LARGE, Move, Others, Outcome, Taken

Mass = Outcome | Taken | Others  # one outcome: each has p, q, moved and log_r
Bounds = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, repr=False)
class Divergence:
    """An f-divergence D_f = E_{a ~ old}[f(new(a) / old(a))].

    Only `name` and `f` are needed. The rest keeps digits or saves time where f alone would not.

    Args:
        name: what logs and messages call it.
        f: convex torch function of the ratio u with f(1) = 0, elementwise, finite for 0 < u < inf. The limit f(0) may
            be infinite. Where there is nothing else it is computed in float64.
        perspective: p f(q / p) as a function of an `Outcome`, from whichever of p, q, q - p and log(q / p) keeps the
            digits; nothing in it may overflow where the divergence does not. Linear in (p, q, q - p).
        series: Taylor coefficients of f at u = 1, from the square up, used where |u - 1| < `radius`.
        radius: see `series`.
        bounds: `(log_p, delta_low, delta_high) -> (log_low, log_high)`, the roots of g_f = delta as log-ratios;
            found by the solver when None.
        narrow: whether `bounds` keeps its digits in float32; otherwise it is given float64.
        shape: what the solver must know of f; read off f, with a check of f, when left out.

    Raises:
        InputError: the name is not a string, or `f` is no function that can be a divergence: not elementwise, not
            convex, f(1) not 0, NaN.

    Source: arXiv 2603.04918, section 3; Csiszar (1967) for the family.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    perspective: Callable[[Mass], Tensor] | None = None
    series: tuple[float, ...] = ()
    radius: float = 0.1
    bounds: Bounds | None = None
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

    def part(self, outcome: Mass, digits: bool = True) -> Tensor:
        """Return p f(q / p), what one outcome adds to the divergence.

        Args:
            outcome: its mass under both policies.
            digits: whether to take the series near u = 1, for values far below delta.

        Returns:
            Tensor of the outcome's shape, >= 0 but for rounding.
        """
        direct = self._plain(outcome) if self.perspective is None else self.perspective(outcome)
        if digits and self.series:
            rise = outcome.moved / outcome.p
            taylor = torch.full_like(rise, self.series[-1])
            for coefficient in self.series[-2::-1]:
                taylor = taylor * rise + coefficient
            direct = torch.where(rise.abs() < self.radius, taylor * rise * outcome.moved, direct)
        return direct

    def of(self, move: Move | tuple[Taken, Others], digits: bool = True) -> Tensor:
        """Return g_f per token, in nats for kl.

        Args:
            move: the tokens' moves, or their outcomes, which several divergences can share.
            digits: whether values far below delta need their digits too.

        Returns:
            Tensor of the tokens' shape, finite.
        """
        taken, others = move.outcomes() if isinstance(move, Move) else move
        return self.part(taken, digits).add_(self.part(others, digits)).clamp_(max=LARGE)

    def _plain(self, outcome: Mass) -> Tensor:
        """Return p f(q / p) by f alone, less its tangent at u = 1; a power law where e^log_r is too far."""
        dtype, wide = outcome.p.dtype, torch.float64 if outcome.p.device.type != "mps" else torch.float32
        log_r, least = outcome.log_r.to(wide), SMALLEST if wide == torch.float64 else 1e-37
        reach = min(self.shape.reach, math.log(torch.finfo(wide).max) - 10)
        u = torch.exp(log_r.clamp(max=reach))
        value = self.f(u.clamp(min=least))
        if self.shape.slope:
            value = value - self.shape.slope * (u - 1)
        if not isinstance(outcome, Taken):
            return (value * outcome.p.to(wide)).to(dtype)
        beyond = (log_r - reach).clamp_(min=0.0)  # where p may be 0 in any arithmetic
        return (torch.exp(outcome.log_p.to(wide) + self.shape.growth * beyond) * value).to(dtype)
