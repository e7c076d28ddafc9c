"""The Triton code of the policy loss: one kernel forward, one backward.

It restates `move`, `gate` and `diagnostics` for one token at a time. exp, expm1 and log1p are written in plain
arithmetic: Triton has no expm1 or log1p that its interpreter runs too, and its exp loses digits away from 0. So what is
tested on a CPU is the code that a GPU runs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bandpo.kernels import Rule

BLOCK = 1024  # tokens at a time in a program
MOST_STEPS = 32  # blocks that a program takes in turn: a token's counts are packed into fields of 6 bits
PROGRAMS = 512  # from here on programs take several blocks; depends on no card, so sums are the same on every card
VALUE, TOKENS, SUMS, MAXIMA, WIDTH = 0, 1, 2, 32, 37  # columns of a row of partial sums: 5 buckets of 6 sums, 5 maxima

LARGE = tl.constexpr(3e38)  # as in `move`
TINY = tl.constexpr(1.2e-38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693145751953125)  # the first 16 bits of ln 2: n times this is exact
LN2_LOW = tl.constexpr(1.42860682030941723e-06)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added, it rounds to an integer, which then stands in the low bits
ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)
LOG_1 = tl.constexpr(math.log(0.01))  # the edges of the buckets
LOG_10 = tl.constexpr(math.log(0.1))
LOG_50 = tl.constexpr(math.log(0.5))
LOG_90 = tl.constexpr(math.log(0.9))
BELOW = tl.constexpr(1 << 6)  # fields of a packed count: tokens, outside below, above, the same without gradient
ABOVE = tl.constexpr(1 << 12)


@triton.jit
def _reduced(x):
    """Return y = e^x / 2^n - 1 with |log(1 + y)| <= ln(2) / 2, and bits whose shift by 23 is n in the exponent."""
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    t = (x - n * LN2_HIGH) - n * LN2_LOW
    series = t * (1 / 40320) + 1 / 5040
    series = series * t + 1 / 720
    series = series * t + 1 / 120
    series = series * t + 1 / 24
    series = series * t + 1 / 6
    series = series * t + 0.5
    return t + t * t * series, shifted.to(tl.int32, bitcast=True) << 23


@triton.jit
def _expm1(x):
    """Return e^x - 1 for x <= 88."""
    y, bits = _reduced(tl.maximum(x, -80.0, propagate_nan=ALL_NAN))
    scale = (bits + (127 << 23)).to(tl.float32, bitcast=True)
    return y * scale + (scale - 1)


@triton.jit
def _exp_and_minus_rest(x):
    """Return e^x and e^x - 1 for x <= 70; e^x is right where it is subnormal too."""
    y, bits = _reduced(tl.maximum(x, -104.0, propagate_nan=ALL_NAN))
    scale = (bits + ((127 + 24) << 23)).to(tl.float32, bitcast=True)
    small = scale * (1.0 / 16777216)
    return (y * scale + scale) * (1.0 / 16777216), y * small + (small - 1)


@triton.jit
def _log1p(x):
    """Return log(1 + x) for -1 <= x <= 1e38."""
    bits = ((1 + x).to(tl.int32, bitcast=True) - 0x3F3504F3) & -8388608  # 2^k <= (1 + x) / sqrt(1/2) < 2^(k+1)
    inverse = (0x3F800000 - bits).to(tl.float32, bitcast=True)  # 2^-k
    f = x * inverse + (inverse - 1)  # 1 + f = (1 + x) / 2^k; f = x, with all its digits, where k = 0
    # (log(1 + f) - f + f^2 / 2) / f^3, fitted over 1 + f from sqrt(1/2) to sqrt(2): to 6e-9 of the logarithm
    series = f * -0.07634234 + 0.1276147
    series = series * f - 0.1316023
    series = series * f + 0.1420178
    series = series * f - 0.1662335
    series = series * f + 0.2000123
    series = series * f - 0.2500082
    series = series * f + 0.3333333
    log = (bits >> 23).to(tl.float32) * LN2 + (f + f * f * (series * f - 0.5))
    return tl.where(x == -1, float("-inf"), log)


@triton.jit
def _divergence(log_ratio, rise, old, DIVERGENCE: tl.constexpr):
    """Return g_f as `Divergence.of` without its digits below delta."""
    p, minus_rest = _exp_and_minus_rest(old)
    minus_rest = tl.minimum(minus_rest, -TINY, propagate_nan=ALL_NAN)
    if DIVERGENCE == "kl":
        x = tl.clamp((rise * p) / minus_rest, -1.0, 1e38, propagate_nan=ALL_NAN)
        reached = _log1p(x) * minus_rest - log_ratio * p
    elif DIVERGENCE == "tv":
        reached = tl.abs(rise * p)
    elif DIVERGENCE == "chi2":
        reached = rise * rise * p / -minus_rest
    else:
        x = tl.clamp((p * rise) / minus_rest, -1.0, LARGE, propagate_nan=ALL_NAN)  # the other outcome's u - 1
        if DIVERGENCE == "neyman":
            inverse = _expm1(tl.minimum(-log_ratio, 88.0, propagate_nan=ALL_NAN)) + 1
            inverse = tl.where(log_ratio < -88.0, float("inf"), inverse)
            reached = rise * rise * inverse * p + x * x / (1 + x) * -minus_rest
        else:
            tl.static_assert(DIVERGENCE == "hellinger")
            root = _expm1(log_ratio * 0.5) + 2
            other = x / (1 + tl.sqrt(1 + x))
            reached = (rise / root) * (rise / root) * p + other * other * -minus_rest
    return reached


@triton.jit
def _gate(
    new, old, adv, low, high, log_cap, log_dual,
    DIVERGENCE: tl.constexpr, FIXED: tl.constexpr, REACHED: tl.constexpr,
):  # fmt: skip
    """Return value, coefficient, the packed count and the divergence of tokens."""
    log_p = tl.maximum(old, -LARGE, propagate_nan=ALL_NAN)
    raw = new - log_p
    log_ratio = tl.clamp(raw, -LARGE, 80.0, propagate_nan=ALL_NAN)
    rise = _expm1(log_ratio)
    reached = rise
    if REACHED:
        reached = _divergence(log_ratio, rise, old, DIVERGENCE)
    if FIXED:
        above, below = rise > high, -rise > low
    else:
        outside = reached > tl.where(raw > 0, high, low)
        above, below = (outside & (raw > 0)) | (raw > log_cap), outside & (raw < 0)
    value = -(adv + adv * rise)
    dual = (log_ratio > log_dual) & (adv < 0)
    shut = (above & (value < 0)) | (below & (value > 0)) | dual
    side = tl.where(above | dual, ABOVE, tl.where(below, BELOW, 0))
    packed = 1 + side + tl.where(shut, side << 12, 0)
    return value, value - value * shut.to(tl.float32), packed, reached


@triton.jit
def _tally(here, packed, reached, count, total, largest):
    """Add the tokens of one bucket to its sums, one sum for each place in the block."""
    seen = tl.where(here, reached, 0.0)
    return count + tl.where(here, packed, 0), total + seen, tl.maximum(largest, seen)


@triton.jit
def _put(row, BUCKET: tl.constexpr, count, total, largest):
    """Write one bucket's columns of a row of partial sums: counts, divergence, and its maximum (NaN if any is)."""
    for field in tl.static_range(5):
        tl.store(row + 2 + 6 * BUCKET + field, tl.sum((count >> (6 * field)) & 63).to(tl.float32))
    whole = tl.sum(total)
    tl.store(row + 2 + 6 * BUCKET + 5, whole)
    tl.store(row + 32 + BUCKET, tl.where(whole == whole, tl.max(largest), whole))


@triton.jit
def _load(x, at, there, token):
    """Return float32 values, 0 where there is no token, even where padding holds NaN."""
    return tl.where(token, tl.load(x + at, mask=there, other=0).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["columns", "steps"])
def _forward(
    logps, old_logps, advantages, mask, coefficients, values, partial,
    n, columns, steps, low, high, log_cap, log_dual,
    DIVERGENCE: tl.constexpr, FIXED: tl.constexpr, BY_ROW: tl.constexpr, STATS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sum_values, tokens = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    n0, d0, m0 = tokens, sum_values, sum_values  # packed counts, sum and maximum of the divergence: a bucket each
    n1, d1, m1 = tokens, sum_values, sum_values
    n2, d2, m2 = tokens, sum_values, sum_values
    n3, d3, m3 = tokens, sum_values, sum_values
    n4, d4, m4 = tokens, sum_values, sum_values
    start = tl.program_id(0) * steps * BLOCK
    for i in range(steps):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        there = at < n
        token = there
        if mask is not None:
            token = there & (tl.load(mask + at, mask=there, other=0) != 0)
        new, old = _load(logps, at, there, token), _load(old_logps, at, there, token)
        adv = _load(advantages, at // columns if BY_ROW else at, there, token)
        value, coefficient, packed, reached = _gate(
            new, old, adv, low, high, log_cap, log_dual, DIVERGENCE, FIXED, STATS or not FIXED
        )
        if coefficients is not None:
            tl.store(coefficients + at, coefficient, mask=there)
        if values is not None:
            tl.store(values + at, value, mask=there)
        sum_values += value
        tokens += token.to(tl.int32)
        if STATS:
            e1, e2, e3, e4 = old > LOG_1, old > LOG_10, old > LOG_50, old > LOG_90
            n0, d0, m0 = _tally(token & ~e1, packed, reached, n0, d0, m0)
            n1, d1, m1 = _tally(token & e1 & ~e2, packed, reached, n1, d1, m1)
            n2, d2, m2 = _tally(token & e2 & ~e3, packed, reached, n2, d2, m2)
            n3, d3, m3 = _tally(token & e3 & ~e4, packed, reached, n3, d3, m3)
            n4, d4, m4 = _tally(token & e4, packed, reached, n4, d4, m4)
    row = partial + tl.program_id(0) * WIDTH
    tl.store(row, tl.sum(sum_values))
    tl.store(row + 1, tl.sum(tokens).to(tl.float32))
    if STATS:
        _put(row, 0, n0, d0, m0)
        _put(row, 1, n1, d1, m1)
        _put(row, 2, n2, d2, m2)
        _put(row, 3, n3, d3, m3)
        _put(row, 4, n4, d4, m4)


@triton.jit
def _backward(grads, coefficients, out, n, SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    grad = tl.load(grads) if SCALAR else tl.load(grads + at, mask=there, other=0)
    coefficient = tl.load(coefficients + at, mask=there, other=0)
    tl.store(out + at, (grad * coefficient).to(out.dtype.element_ty), mask=there)


INTERPRETED = not isinstance(_forward, triton.JITFunction)


class FusedLoss(torch.autograd.Function):
    """The kernels as one operation of autograd: logps, old_logps, advantages, mask, and what is wanted.

    Returns the value (per token, or its sum over the tokens), the sums and the maxima of the columns of partial sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor | None,
        rule: Rule,
        per_token: bool,
        stats: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the forward kernel and add up its rows of partial sums."""
        n, row = logps.numel(), logps.shape[-1] if logps.dim() else 1
        by_row = row > 1 and (advantages.shape[-1] == 1 or advantages.stride(-1) == 0)
        adv = advantages[..., :1] if by_row else advantages
        blocks = triton.cdiv(n, BLOCK)
        steps = max(1, min(MOST_STEPS, blocks // PROGRAMS))
        programs, width = triton.cdiv(blocks, steps), WIDTH if stats else SUMS
        new = functools.partial(torch.empty, dtype=torch.float32, device=logps.device)
        coefficients = new(logps.shape) if ctx.needs_input_grad[0] else None
        values = new(logps.shape) if per_token else None
        partial = new(programs, width)
        data = *map(_flat, (logps, old_logps, adv)), None if mask is None else _flat(mask)
        limits = rule.low, rule.high, rule.log_cap, rule.log_dual
        with _on(logps):
            _forward[(programs,)](
                *data, coefficients, values, partial, n, row, steps, *limits,
                DIVERGENCE=rule.divergence, FIXED=rule.fixed, BY_ROW=by_row, STATS=stats,
                WIDTH=width, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        sums = partial.sum(0, dtype=torch.float64)  # counts above 2^24 stay exact
        value, totals = sums[VALUE].float() if values is None else values, sums.float()
        maxima = partial[:, MAXIMA:].amax(0) if stats else totals
        ctx.save_for_backward(coefficients)
        ctx.dtype = logps.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(totals, maxima)
        return value, totals, maxima

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backward kernel: the gradient by logps, in their dtype."""
        (coefficients,), grad = ctx.saved_tensors, grads[0]
        if grad is None:
            return (None,) * 7
        out = torch.empty_like(coefficients, dtype=ctx.dtype)
        scalar = not any(grad.stride())
        n = out.numel()
        with _on(out):
            _backward[(triton.cdiv(n, BLOCK),)](
                grad if scalar else _flat(grad), coefficients, out, n, SCALAR=scalar, BLOCK=BLOCK
            )
        return out, *(None,) * 6


def _flat(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1)


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
