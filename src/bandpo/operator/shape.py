"""What a solver must know of f before it starts, read off f itself once, when a divergence is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo._input import InputError

SMALLEST = 1e-300  # stands for u = 0, where many an f computes 0 * inf
BEND = 0.005  # step of the search for bends of f, in log |u - 1|


class Shape(NamedTuple):
    """How f behaves at u = 1 and at the ends of its domain; only the speed of the solver depends on its digits.

    Args:
        at_zero: f(0), inf where f has no end there. The region reaches the simplex's end only where this is finite.
        curvature: f''(1), about: g_f is half of it times chi-squared near r = 1.
        fall: the rate at which f, or at_zero - f where that is finite, goes as u = e^-w falls: e^(fall w), e^(-fall w).
        growth: the power of u with which f grows for large u.
        reach: log of a u up to which f is finite, and nothing in it overflows.
        slope: f'(1); f less slope times (u - 1) is the same divergence, and no longer loses digits near u = 1.
        smooth: whether f has no bend or flat piece but at u = 1. Where it has, the solver halves, which is slow.
        far: log(f(u) / u) as a function of log u, for an f of this family that is no power of u for large u; or None.
    """

    at_zero: float
    curvature: float = 1.0
    fall: float = 1.0
    growth: float = 1.0
    reach: float = 690.0
    slope: float = 0.0
    smooth: bool = True
    far: Callable[[Tensor], Tensor] | None = None


def read_shape(name: str, f: Callable[[Tensor], Tensor]) -> Shape:
    """Return the `Shape` of f, after checking that f can be a divergence.

    Args:
        name: the divergence's name, for messages.
        f: torch function of the ratio u, elementwise.

    Returns:
        The `Shape`.

    Raises:
        InputError: f does not map a float64 tensor to one of the same shape, f(1) is not 0, f is NaN or infinite
            between e^-30 and e^30, or f is not convex there.
    """
    with torch.device("cpu"):  # whatever the default device is: f is looked at once, at a few hundred points
        return _read(name, f)


def _read(name: str, f: Callable[[Tensor], Tensor]) -> Shape:
    half = torch.linspace(0.0, 30.0, 121, dtype=torch.float64)[1:].exp()
    u = torch.cat([1 / half.flip(0), torch.ones(1, dtype=torch.float64), half])
    values = _evaluate(name, f, u)
    _check_convex(name, u, values)
    slope = _slope(f)

    def at(log_u: float) -> float:
        point = torch.full((1,), max(math.exp(log_u), SMALLEST), dtype=torch.float64)
        return float((f(point) - slope * (point - 1)).sum())

    deep, middle = at(-690.0), at(-345.0)
    if math.isfinite(deep) and abs(deep - middle) <= 1e-6 * abs(deep):
        at_zero, fall = deep, (_log(deep - at(-10.0)) - _log(deep - at(-20.0))) / 10
    else:  # as a power of 1/u, or more slowly, as a logarithm, whose power is log(2) / 345 here
        at_zero, fall = math.inf, (_log(deep) - _log(middle)) / 345
        if not math.isfinite(deep):
            fall = (_log(at(-20.0)) - _log(at(-10.0))) / 10
        elif fall < 0.005:
            fall = 1e-4
    reach = next(end for end in (690.0, 340.0, 230.0, 100.0, 30.0) if math.isfinite(at(end)))
    growth = round((_log(at(reach)) - _log(at(reach / 2))) / (reach / 2), 2)  # of u log u it is 1
    curvature = max((at(1e-3) + at(-1e-3)) * 1e6, 0.0)
    fall = 1.0 if fall <= 0 or 0.8 < fall < 1.25 else min(max(fall, 1e-4), 50.0)
    shape = Shape(at_zero, curvature, fall, min(max(growth, 1.0), 50.0), reach, slope)
    return shape._replace(smooth=curvature > 0 and _is_smooth(f, shape))


def _is_smooth(f: Callable[[Tensor], Tensor], shape: Shape) -> bool:
    """Return whether log f is smooth, over the coordinates of the solver, on both sides of u = 1.

    By its third differences, a step h apart: h^3 or less for the family, h^2 at a jump of f'', h at a bend of f.
    """
    rise = torch.exp(torch.arange(-6.0, 29.0, BEND, dtype=torch.float64))
    w = torch.log1p(shape.fall * rise) / shape.fall
    w = w[w < 29.0]
    above, below = f(1 + rise) - shape.slope * rise, f(torch.exp(-w)) - shape.slope * torch.expm1(-w)
    if math.isfinite(shape.at_zero):
        left = shape.at_zero - below
        below = (below / left)[left > 1e-6 * shape.at_zero]  # nearer to the end, `left` has no digits
    return all(bool((x.log().diff(n=3).abs() < 4 * BEND**3).all()) for x in (above, below))


def _log(x: float) -> float:
    return math.log(max(x, SMALLEST))


def _evaluate(name: str, f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    try:
        values = f(u)
    except Exception as error:
        raise InputError(
            f"Divergence {name!r}: f(u) raised {type(error).__name__}: {error}; f must be made of torch operations "
            "that take a float64 tensor"
        ) from error
    if not isinstance(values, Tensor) or values.shape != u.shape:
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"Divergence {name!r}: f(u) of a tensor of shape {tuple(u.shape)} is {got}: must be elementwise"
        )
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        where = float(u[bad][0])
        raise InputError(
            f"Divergence {name!r}: f({where:.3g}) is {float(values[bad][0])}: must be finite for 0 < u < inf; "
            "write f so that nothing in it overflows or is 0 / 0"
        )
    at_one = float(values[len(u) // 2])
    if abs(at_one) > 1e-9:
        raise InputError(f"Divergence {name!r}: f(1) = {at_one:g}: must be 0; give f(u) - f(1)")
    return values.to(torch.float64)


def _check_convex(name: str, u: Tensor, values: Tensor) -> None:
    steps = u.diff()
    slopes = values.diff() / steps
    noise = 1e-14 * (values.abs() + 1 + u)  # rounding of f, whose terms may be much larger than f
    tolerance = (noise[1:] + noise[:-1]) / steps
    falls = slopes.diff() < -(tolerance[1:] + tolerance[:-1]) - 1e-9 * (slopes[1:].abs() + slopes[:-1].abs())
    if bool(falls.any()):
        where = float(u[1:-1][falls][0])
        raise InputError(
            f"Divergence {name!r}: f is not convex at u = {where:.3g}, where its slope falls: only a convex f with "
            "f(1) = 0 is an f-divergence; check the sign and the argument (u = new / old)"
        )


def _slope(f: Callable[[Tensor], Tensor]) -> float:
    """Return f'(1), or any slope of a tangent there when f has a kink."""
    with torch.enable_grad():
        one = torch.ones(1, dtype=torch.float64, requires_grad=True)
        value = f(one).sum()
        slope = float(torch.autograd.grad(value, one)[0]) if value.requires_grad else 0.0
    return slope if math.isfinite(slope) else 0.0
