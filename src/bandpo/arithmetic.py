"""exp, expm1 and log1p with all their digits, in eager mode and in compiled code.

Inductor's CPU code evaluates expm1 as exp(x) - 1, and calls a library for each exp and log1p. So for float32 on a CPU
it is given plain arithmetic: faster, and right to about 1e-7. `n` below is the integer next to x / ln 2; added to
1.5 * 2^23 it stands in a number's low bits, from where a shift makes it an exponent.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND = 12582912.0  # 1.5 * 2^23
LOG2_E, LN2, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.6931471805599453, 0.693145751953125, 1.42860682030941723e-06
EXP = (1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5)
# (log(1 + f) - f + f^2 / 2) / f^3, fitted over 1 + f from sqrt(1/2) to sqrt(2): to 6e-9 of the logarithm
LOG = (-0.07634234, 0.1276147, -0.1316023, 0.1420178, -0.1662335, 0.2000123, -0.2500082, 0.3333333)
LEAST, MOST = -87.0, 88.0  # between which e^x is a float32 that is neither subnormal nor infinite


def exp(x: Tensor) -> Tensor:
    """Return e^x, for x <= 88; in compiled code 0 where it would be subnormal.

    Args:
        x: float32 or float64 tensor.

    Returns:
        The result.
    """
    if not torch.compiler.is_compiling() or not _by_hand(x):
        return torch.exp(x)
    y, scale = _reduced(x)
    return torch.where(x < LEAST, 0.0, y * scale + scale)


def expm1(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return e^x - 1 with all its digits near 0, for x <= 88.

    Args:
        x: float32 or float64 tensor.
        out: where to put the result in eager mode; `x` itself is allowed.

    Returns:
        The result; a new tensor in compiled code.
    """
    if not torch.compiler.is_compiling():
        return torch.expm1(x, out=out)
    if _by_hand(x):
        y, scale = _reduced(x)
        return y * scale + (scale - 1)
    series = torch.ones_like(x)
    for n in range(8 if x.dtype == torch.float32 else 15, 1, -1):
        series = 1 + x * (1.0 / n) * series
    return torch.where(x.abs() < 0.5, x * series, torch.exp(x) - 1)


def log1p(x: Tensor) -> Tensor:
    """Return log(1 + x) with all its digits near 0, for -1 <= x <= 1e38; in eager mode in the place of `x`.

    Args:
        x: float32 or float64 tensor.

    Returns:
        The result.
    """
    if not torch.compiler.is_compiling():
        return x.log1p_()
    if not _by_hand(x):
        return torch.log1p(x)
    bits = ((1 + x).view(torch.int32) - 0x3F3504F3) & -8388608  # 2^k <= (1 + x) / sqrt(1/2) < 2^(k+1), k * 2^23
    inverse = (0x3F800000 - bits).view(torch.float32)
    f = x * inverse + (inverse - 1)  # 1 + f = (1 + x) / 2^k; f = x, with all its digits, where k = 0
    log = (bits >> 23).to(torch.float32) * LN2 + (f + f * f * (_polynomial(LOG, f) * f - 0.5))
    return torch.where(x == -1, -torch.inf, log)


def _by_hand(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and a power of 2 with (1 + y) scale = e^x."""
    x = x.clamp(LEAST, MOST)
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    t = (x - n * LN2_HIGH) - n * LN2_LOW
    scale = ((shifted.view(torch.int32) << 23) + (127 << 23)).view(torch.float32)
    return t + t * t * _polynomial(EXP, t), scale


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value
