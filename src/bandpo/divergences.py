"""The f-divergences: each one is f, its two-outcome form, and its bounds where they have a form of their own.

Merging all actions but the sampled one leaves two outcomes, Bernoulli(p) and Bernoulli(q), with q = r p, and the trust
region becomes one scalar condition on the ratio r (arXiv 2603.04918):

    g_f(p, r) = p f(r) + (1 - p) f((1 - r p) / (1 - p)) <= delta

To add a divergence, add one `Divergence(...)` to `FAMILY` at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._checks import InputError, nearest
from bandpo.move import LARGE, Move, expm1_


@dataclass(frozen=True)
class Divergence:
    """An f-divergence D_f = E_{a ~ old}[f(new(a) / old(a))].

    Args:
        name: what logs and messages call it.
        f: convex torch function of the ratio with f(1) = 0, elementwise.
        binary: g_f as a function of a `Move`, where f alone would lose digits; made from `f` when None.
        bounds: `(log_p, delta_low, delta_high) -> (log_low, log_high)`, the roots of g_f = delta as log-ratios;
            found by bracketing when None.

    Raises:
        InputError: `f` is not callable or the name is not a string.

    Source: arXiv 2603.04918, section 3; Csiszar (1967) for the family.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    binary: Callable[[Move], Tensor] | None = None
    bounds: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.f):
            raise InputError(
                f"Divergence(name={self.name!r}, f={self.f!r}): name must be a string and f a torch function"
            )

    def of(self, move: Move) -> Tensor:
        """Return g_f per token in nats (for KL); it may overwrite the scratch tensors of `move`.

        Args:
            move: the tokens' moves.

        Returns:
            Tensor of the tokens' shape, >= 0; inf where q >= 1 and the divergence has no finite value there.
        """
        if self.binary is not None:
            return self.binary(move)
        p, rest = move.p(), move.rest()
        other = 1 - (p * move.rise / rest).clamp_(-LARGE, 1.0)
        return p * self.f(1 + move.rise) + rest * self.f(other)


def _kl_binary(move: Move) -> Tensor:
    # -p log r - (1-p) log((1-q)/(1-p)), where (1-q)/(1-p) = 1 - x
    p = move.p()
    x, weighted = move.rise.mul_(p), move.log_ratio.mul_(p)
    del p
    rest = move.rest()
    x.div_(rest).clamp_(-LARGE, 1.0)
    return x.neg_().log1p_().mul_(rest).add_(weighted).neg_()


def _tv_binary(move: Move) -> Tensor:
    return move.rise.mul_(move.p()).abs_()


def _chi2_binary(move: Move) -> Tensor:
    return move.rise.mul_(move.rise).mul_(move.p()).div_(move.rest())


def _kl_tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
    """Return v = A w > 0 with  A w - B log1p((A/B)(1 - e^-w)) = delta,  A = shrink, B = grow = 1 - A.

    w is how far the outcome of probability A falls in log-probability while the other takes up its mass. In v every
    quantity stays finite as A -> 0. The start is the root's expansion to second order in sqrt(delta); Newton on this
    convex function then doubles the digits: 2 steps give 7e-8, 3 give 1e-13, for every p and delta.
    """
    inverse = shrink.reciprocal()
    v = (2 * delta * shrink * grow).sqrt_().add_((1 + shrink).mul_(delta / 3))
    for _ in range(2 if shrink.dtype == torch.float32 else 3):
        m = expm1_(torch.mul(v, inverse).neg_()).neg_()
        x = shrink * m
        slope = torch.add(x, grow).div_(m)  # dv = (q / m) dF, with q = B + A m
        excess = x.div_(grow).log1p_().mul_(grow).add_(delta).sub_(v)
        v.addcmul_(excess, slope)
    return v


def _kl_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    # Below p = e^-87 (float32) the upper bound is exactly (1 - e^-delta)/p, so the rest of log p is added at the end,
    # and r_low = e^(-delta/p) is zero for any use: it saturates.
    floor = log_p.clamp(min=-87.0 if log_p.dtype == torch.float32 else -700.0)
    p, rest = torch.exp(floor), expm1_(floor.clone()).neg_()
    low = _kl_tail(p, rest.clamp(min=1e-38), delta_low).div_(p).neg_()
    rest.clamp_(min=1e-38)
    moved = expm1_(_kl_tail(rest, p, delta_high).div_(rest).neg_()).neg_().mul_(rest)
    return low, moved.div_(p).log1p_().add_(floor).sub_(log_p)


def _one_plus_minus_exp(u_low: Tensor, u_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - e^u_low), -inf where u_low >= 0, and log(1 + e^u_high)."""
    u = u_low.clamp(max=0.0)
    near_one = torch.log(-expm1_(u.clone()))
    low = torch.where(u > -math.log(2), near_one, torch.log1p(-torch.exp(u)))
    return low, torch.nn.functional.softplus(u_high, threshold=80.0)


def _tv_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    return _one_plus_minus_exp(torch.log(delta_low) - log_p, torch.log(delta_high) - log_p)  # 1 -+ delta / p


def _chi2_bounds(log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    log_odds = log_p - torch.log(-expm1_(log_p.clone()))  # 1 -+ sqrt(delta (1-p)/p)
    return _one_plus_minus_exp((torch.log(delta_low) - log_odds) / 2, (torch.log(delta_high) - log_odds) / 2)


FAMILY: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("kl", lambda u: u - 1 - torch.log(u), _kl_binary, _kl_bounds),  # KL(old || new)
        Divergence("tv", lambda u: (u - 1).abs() / 2, _tv_binary, _tv_bounds),  # total variation
        Divergence("chi2", lambda u: (u - 1).square(), _chi2_binary, _chi2_bounds),  # Pearson
    )
}


def get_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence of that name; a `Divergence` is returned as it is.

    Args:
        divergence: a name in the family, or a `Divergence`.

    Returns:
        The `Divergence`.

    Raises:
        InputError: no divergence has that name; the nearest one is named.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if divergence in FAMILY:
        return FAMILY[divergence]
    raise InputError(
        f"divergence={divergence!r}: must be one of {', '.join(FAMILY)}{nearest(divergence, FAMILY)}, "
        "or your own: bandpo.Divergence(name='mine', f=lambda u: ...)"
    )
