"""The family: every divergence that has a name. To add one, add one entry to `FAMILY` at the end of this file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, check_number, is_import_path, load_object, nearest
from bandpo.operator.closed import chi2_bounds, hellinger_tail, kl_tail, neyman_tail, tv_bounds
from bandpo.operator.divergence import Divergence, Mass
from bandpo.operator.shape import Shape
from bandpo.operator.solver import tail_bounds
from bandpo.operator.tokens import Outcome, Taken, expm1

FAR = 40.0  # e^40 - 1 is e^40 in every dtype


# ---------------------------------------------------------------- p f(q / p)


def _tv(o: Mass) -> Tensor:
    return o.moved.abs() / 2


def _chi2(o: Mass) -> Tensor:
    if isinstance(o, Taken):  # where squares of p and q may underflow
        return torch.exp(o.log_p + 2 * o.log_r.clamp(min=0.0)) * o.fall**2
    return o.moved**2 / _positive(o.p)


def _neyman(o: Mass) -> Tensor:
    if isinstance(o, Taken):
        log_q = o.log_q.clamp(min=-1e9)  # inf - inf would be NaN
        return torch.exp(log_q - 2 * (log_q - o.log_p).clamp(max=0.0)) * o.fall**2
    return o.moved**2 / _positive(o.q)


def _hellinger(o: Mass) -> Tensor:
    return (o.moved / _positive(o.p.sqrt() + o.q.sqrt())) ** 2  # (sqrt q - sqrt p)^2


def _js(o: Mass) -> Tensor:
    # p log(p/m) + q log(q/m),  m = (p + q) / 2: the logarithm of m by the larger of p and q, log r beside the smaller
    log_m = torch.log1p(o.moved.abs() / _positive(torch.maximum(o.p, o.q)) / -2)
    return torch.addcmul(torch.minimum(o.p, o.q) * o.log_r.abs(), o.p + o.q, log_m).neg_()


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class CressieRead:
    """The perspective of f(u) = (u^a - 1 - a (u - 1)) / (a (a - 1)); for a = 0 kl, for a = 1 reverse_kl."""

    a: float

    def __call__(self, o: Mass) -> Tensor:
        """Return p f(q / p)."""
        a = self.a
        if a == 0:
            return torch.addcmul(o.moved, o.p, o.log_r, value=-1.0)
        if a < 0.5:
            return (_grown(o, "p", a * o.log_r) / a - o.moved) / (a - 1)
        m = (a - 1) * o.log_r
        if a < 1:  # where q underflows e^m grows, and has long ceased to count
            m = m.clamp(max=80.0 if m.dtype == torch.float32 else 600.0)
        power = o.q * o.log_r if a == 1 else _grown(o, "q", m) / (a - 1)
        return (power - o.moved) / a


def _grown(o: Mass, which: str, m: Tensor) -> Tensor:
    """Return mass (e^m - 1), the mass being the outcome's p or q, where 0 * inf may not arise."""
    mass: Tensor = getattr(o, which)
    if isinstance(o, Taken):
        return torch.where(m < FAR, mass * expm1(m.clamp(max=FAR)), torch.exp(getattr(o, f"log_{which}") + m))
    return expm1(m) * mass


@dataclass(frozen=True)
class FromPerspective:
    """f(u) = 1 f(u / 1), for members of the family that are defined by their perspective."""

    perspective: Callable[[Mass], Tensor]

    def __call__(self, u: Tensor) -> Tensor:
        """Return f(u)."""
        return self.perspective(Outcome(torch.ones_like(u), u, u - 1, torch.log(u)))


# ---------------------------------------------------------------- the table


def _far(a: float, log_u: Tensor) -> Tensor:
    """Return log(f(u) / u) of a Cressie-Read divergence near order 1, which is no power law before u overflows."""
    y = log_u.clamp(min=9.0)
    if a == 1:
        return torch.log(y - 1)
    m = (a - 1) * y
    near = m.clamp(max=600.0 if m.dtype == torch.float64 else 80.0)
    return torch.log(torch.expm1(near) / (a - 1) - 1) + (m - near)


def alpha_divergence(a: float, name: str = "", **closed: Any) -> Divergence:
    """Return the Cressie-Read divergence of order a.

    f(u) = (u^a - 1 - a (u-1)) / (a (a-1));  a -> 0 is kl, a -> 1 reverse_kl, a = 2 chi2 / 2, a = -1 neyman / 2 and
    a = 1/2 twice hellinger.

    Args:
        a: the order, any finite real.
        name: its name; "alpha:A" when empty.
        **closed: further fields of the `Divergence`.

    Returns:
        The `Divergence`.

    Raises:
        InputError: an order that is not finite.

    Source: Cressie and Read (1984).
    """
    a = check_number("alpha", a, -math.inf)
    series = [0.5]
    for n in range(2, 17):
        series.append(series[-1] * (a - n) / (n + 1))
    growth = max(a, 1.0)
    at_zero, fall = (1 / a, min(a, 1.0)) if a > 0 else (math.inf, max(-a, 1e-9))
    far = functools.partial(_far, a) if abs(a - 1) < 0.03 else None
    shape = Shape(at_zero, 1.0, fall, growth, 600 / growth, smooth=-20 <= a <= 10, far=far)
    perspective, radius = CressieRead(a), 0.1 / max(1.0, abs(a))
    name = name or f"alpha:{a:g}"
    return Divergence(name, FromPerspective(perspective), perspective, tuple(series), radius, shape=shape, **closed)


def _member(name: str, perspective: Callable[[Mass], Tensor], shape: Shape, **fields: Any) -> Divergence:
    return Divergence(name, FromPerspective(perspective), perspective, shape=shape, **fields)


def _by_tail(tail: Callable[[Tensor, Tensor, Tensor], Tensor]) -> functools.partial[tuple[Tensor, Tensor]]:
    return functools.partial(tail_bounds, tail, Shape(math.inf))


_JS_SERIES = tuple((-1) ** n * (1 - 2.0 ** (1 - n)) / (n * (n - 1)) for n in range(2, 19))

FAMILY: dict[str, Divergence] = {
    d.name: d
    for d in (
        alpha_divergence(0, "kl", bounds=_by_tail(kl_tail), narrow=True),  # KL(old || new)
        _member("tv", _tv, Shape(0.5, 1000.0), bounds=tv_bounds),
        _member("chi2", _chi2, Shape(1.0, 2.0, growth=2.0, reach=340.0), bounds=chi2_bounds),  # Pearson
        alpha_divergence(1, "reverse_kl"),  # KL(new || old)
        _member("neyman", _neyman, Shape(math.inf, 2.0, reach=340.0), bounds=_by_tail(neyman_tail), narrow=True),
        _member("hellinger", _hellinger, Shape(1.0, 0.5, 0.5), bounds=_by_tail(hellinger_tail)),  # squared, in [0, 2]
        _member("js", _js, Shape(math.log(2), 0.5), series=_JS_SERIES),  # twice Jensen-Shannon
    )
}


def get_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence of that name; a `Divergence` is returned as it is.

    Args:
        divergence: a name in the family, "alpha:A" for any real A, an import path of one of your own
            ("path/to/file.py:name" or "package.module:name"), or a `Divergence`.

    Returns:
        The `Divergence`.

    Raises:
        InputError: no divergence has that name (the nearest one is named), or it is some other object.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise InputError(
            f"divergence={divergence!r}: a {type(divergence).__name__} is no bandpo.Divergence; give a name, or a "
            "convex f of u = new / old with f(1) = 0: bandpo.Divergence(name='mine', f=f)"
        )
    if divergence in FAMILY:
        return FAMILY[divergence]
    if divergence.startswith("alpha:"):
        try:
            return alpha_divergence(float(divergence.removeprefix("alpha:")))
        except ValueError:
            raise InputError(f"divergence={divergence!r}: alpha must be a finite number, as in 'alpha:0.5'") from None
    if is_import_path(divergence):
        return get_divergence(load_object(divergence, "divergence"))
    raise InputError(
        f"divergence={divergence!r}: must be one of {', '.join(FAMILY)}, alpha:A{nearest(divergence, FAMILY)}, "
        "an import path (path/to/file.py:name), or your own: bandpo.Divergence(name='mine', f=lambda u: ...)"
    )
