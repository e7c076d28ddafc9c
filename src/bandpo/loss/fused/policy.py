"""The Triton code of the policy loss: one kernel forward, one backward.

It restates `Tokens`, the hard gate and `ClipStats` for one token at a time. exp, expm1 and log1p are written in plain
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

from bandpo.loss.fused import Rule
from bandpo.loss.stats import BUCKETS, FIELDS, MEASURES, MOST_RATIO, MOST_REACHED, SIGNS, ClipStats

BLOCK, STATS_BLOCK = 1024, 512  # tokens at a time in a program, without and with statistics
MOST_STEPS = 32  # blocks that a program takes in turn
PROGRAMS = 512  # from here on programs take several blocks; depends on no card, so sums are the same on every card
SIZE = 16  # at least as many as bins (15, one more for padding) and as fields
VALUE, TOKENS, SUMS = 0, 1, 2  # columns of a row of partial sums; then SIZE x SIZE sums and SIZE maxima of each measure
WIDTH = SUMS + SIZE * SIZE + SIZE * len(MEASURES)

LARGE = tl.constexpr(3e38)  # as in `tokens`
CERTAIN = tl.constexpr(2.0**-28)
LOG_CERTAIN = tl.constexpr(-28 * math.log(2))
TINY = tl.constexpr(2.0**-126)
MOST = tl.constexpr(MOST_RATIO)
REACHED = tl.constexpr(MOST_REACHED)
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
def _exp(x):
    """Return e^x for x <= 70, right where it is subnormal too."""
    y, bits = _reduced(tl.maximum(x, -104.0, propagate_nan=ALL_NAN))
    scale = (bits + ((127 + 24) << 23)).to(tl.float32, bitcast=True)
    return (y * scale + scale) * (1.0 / 16777216)


@triton.jit
def _ratio_and_rise(x):
    """Return e^x and e^x - 1 for x <= 88."""
    y, bits = _reduced(tl.maximum(x, -80.0, propagate_nan=ALL_NAN))
    scale = (bits + (127 << 23)).to(tl.float32, bitcast=True)
    return tl.where(x < -80.0, _exp(x), y * scale + scale), y * scale + (scale - 1)


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
def _moved(new, old, log_ratio):
    """Return p, 1 - p and q - p, as `Move` has them."""
    larger = _exp(tl.maximum(new, old, propagate_nan=ALL_NAN))
    fall = _expm1(-tl.abs(log_ratio))
    rest = tl.maximum(-_expm1(old), CERTAIN, propagate_nan=ALL_NAN)
    return _exp(old), rest, tl.where(log_ratio < 0, larger * fall, -larger * fall)


@triton.jit
def _kl(p, rest, moved, log_ratio):
    share = tl.maximum(-moved, -(rest - CERTAIN), propagate_nan=ALL_NAN) / rest
    log_other = tl.maximum(_log1p(share), LOG_CERTAIN, propagate_nan=ALL_NAN)
    return (moved - p * log_ratio) + (-moved - rest * log_other)


@triton.jit
def _square(log_mass, rise, log_ratio):
    """Return (q - p)^2 / mass, the mass being p or q: e^(log_mass + 2 rise) (1 - e^-|log r|)^2, at most e^69."""
    fall = _expm1(-tl.abs(log_ratio))
    return _exp(tl.minimum(log_mass + 2 * rise, 69.0, propagate_nan=ALL_NAN)) * fall * fall


@triton.jit
def _divergence(p, rest, moved, log_ratio, new, old, DIVERGENCE: tl.constexpr):
    """Return g_f as `Divergence.of` without its digits below delta."""
    if DIVERGENCE == "kl":
        reached = _kl(p, rest, moved, log_ratio)
    elif DIVERGENCE == "tv":
        reached = tl.abs(moved)
    elif DIVERGENCE == "chi2":
        reached = _square(old, tl.maximum(log_ratio, 0.0, propagate_nan=ALL_NAN), log_ratio) + moved * moved / rest
    else:
        q, rest_q = (
            _exp(new),
            tl.maximum(-_expm1(tl.minimum(new, 0.0, propagate_nan=ALL_NAN)), CERTAIN, propagate_nan=ALL_NAN),
        )
        if DIVERGENCE == "neyman":
            low = tl.maximum(new, -1e9, propagate_nan=ALL_NAN)
            rise = tl.maximum(old - low, 0.0, propagate_nan=ALL_NAN)
            reached = _square(low, rise, log_ratio) + moved * moved / rest_q
        else:
            tl.static_assert(DIVERGENCE == "hellinger")
            mine = moved / tl.maximum(tl.sqrt(p) + tl.sqrt(q), TINY, propagate_nan=ALL_NAN)
            other = moved / (tl.sqrt(rest) + tl.sqrt(rest_q))
            reached = mine * mine + other * other
    return tl.minimum(reached, LARGE, propagate_nan=ALL_NAN)


@triton.jit
def _gate(side, adv, ratio, log_ratio, log_dual):
    """Return the loss's value and its derivative by logps."""
    value = -ratio * adv
    shut = (side * adv > 0) | ((log_ratio > log_dual) & (adv < 0))
    return value, value - value * shut.to(tl.float32)


@triton.jit
def _put(rows, column, COLUMN: tl.constexpr, field):
    return tl.where(column == COLUMN, field[:, None], rows)


@triton.jit
def _rows(token, side, capped, coefficient, adv, sign, ratio, log_ratio, kl, tv, own, SIZE: tl.constexpr):
    """Return the row of `ClipStats` of each token: (BLOCK, SIZE)."""
    column = tl.arange(0, SIZE)[None, :]
    one = token.to(tl.float32)
    rows = tl.where(column == 0, one[:, None], 0.0)
    rows = _put(rows, column, 1, tl.where(side < 0, one, 0.0))
    rows = _put(rows, column, 2, tl.where((side > 0) & ~capped, one, 0.0))
    rows = _put(rows, column, 3, tl.where(capped, one, 0.0))
    lost = (coefficient == 0) & (adv != 0)
    rows = _put(rows, column, 4, tl.where(lost & (log_ratio <= 0), one, 0.0))
    rows = _put(rows, column, 5, tl.where(lost & (log_ratio > 0), one, 0.0))
    most, c = tl.abs(adv) * MOST, -coefficient * sign
    rows = _put(rows, column, 6, tl.minimum(tl.maximum(c, 0.0, propagate_nan=ALL_NAN), most, propagate_nan=ALL_NAN))
    rows = _put(rows, column, 7, tl.minimum(tl.maximum(-c, 0.0, propagate_nan=ALL_NAN), most, propagate_nan=ALL_NAN))
    rows = _put(rows, column, 8, tl.minimum(tl.abs(ratio * adv), most, propagate_nan=ALL_NAN))
    rows = _put(rows, column, 9, kl)
    rows = _put(rows, column, 10, tv)
    return _put(rows, column, 11, own)


@triton.jit
def _load(x, at, there, token):
    """Return float32 values, 0 where there is no token, even where padding holds NaN."""
    return tl.where(token, tl.load(x + at, mask=there, other=0).to(tl.float32), 0.0)


@triton.jit
def _outside(new, old, log_ratio, rise, low, high, log_cap, DIVERGENCE: tl.constexpr, FIXED: tl.constexpr):
    """Return the side of each token, whether it is past the cap alone, and the divergence in the clip's measure."""
    capped = log_ratio > log_cap
    if FIXED:
        side, own = (rise > high).to(tl.float32) - (-rise > low).to(tl.float32), rise
    else:
        p, rest, moved = _moved(new, old, log_ratio)
        own = _divergence(p, rest, moved, log_ratio, new, old, DIVERGENCE)
        outside = own > tl.where(log_ratio > 0, high, low)
        capped = capped & ~(outside & (log_ratio > 0))
        side = tl.where((outside & (log_ratio > 0)) | capped, 1.0, tl.where(outside & (log_ratio < 0), -1.0, 0.0))
    return side, capped, own


@triton.jit
def _largest(chosen, value, before):
    return tl.maximum(before, tl.max(tl.where(chosen, value[None, :], 0.0), axis=1))


@triton.jit
def _tally(
    sums, most_kl, most_tv, most_own, token, new, old, log_ratio, ratio, adv, coefficient, side, capped, own,
    FIXED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return the sums and maxima with a block of tokens added."""
    p, rest, moved = _moved(new, old, log_ratio)
    kl, tv = _kl(p, rest, moved, log_ratio), tl.abs(moved)
    own = tl.clamp(kl if FIXED else own, 0.0, REACHED, propagate_nan=ALL_NAN)
    kl = tl.clamp(kl, 0.0, REACHED, propagate_nan=ALL_NAN)
    sign = tl.where(adv > 0, 1.0, tl.where(adv < 0, -1.0, 0.0))
    bucket = (old > LOG_1).to(tl.int32) + (old > LOG_10) + (old > LOG_50) + (old > LOG_90)
    place = tl.where(token, 5 * (sign.to(tl.int32) + 1) + bucket, SIZE - 1)
    chosen = tl.arange(0, SIZE)[:, None] == place[None, :]
    rows = _rows(token, side, capped, coefficient, adv, sign, ratio, log_ratio, kl, tv, own, SIZE)
    sums = tl.dot(chosen.to(tl.float32), rows, sums, input_precision="ieee")
    return sums, _largest(chosen, kl, most_kl), _largest(chosen, tv, most_tv), _largest(chosen, own, most_own)


@triton.jit(do_not_specialize=["columns", "steps"])
def _forward(
    logps, old_logps, advantages, mask, coefficients, values, partial,
    n, columns, steps, low, high, log_cap, log_dual,
    DIVERGENCE: tl.constexpr, FIXED: tl.constexpr, BY_ROW: tl.constexpr, STATS: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sum_values, tokens = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    bins = tl.arange(0, SIZE)
    sums = tl.zeros([SIZE, SIZE], tl.float32)
    most_kl = tl.zeros([SIZE], tl.float32)
    most_tv, most_own = most_kl, most_kl
    start = tl.program_id(0) * steps * BLOCK
    for i in range(steps):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        there = at < n
        token = there
        if mask is not None:
            token = there & (tl.load(mask + at, mask=there, other=0) != 0)
        new = _load(logps, at, there, token)
        old = tl.maximum(_load(old_logps, at, there, token), -LARGE, propagate_nan=ALL_NAN)
        adv = _load(advantages, at // columns if BY_ROW else at, there, token)
        log_ratio = tl.clamp(new - old, -LARGE, LARGE, propagate_nan=ALL_NAN)
        ratio, rise = _ratio_and_rise(tl.minimum(log_ratio, 80.0, propagate_nan=ALL_NAN))
        side, capped, own = _outside(new, old, log_ratio, rise, low, high, log_cap, DIVERGENCE, FIXED)
        value, coefficient = _gate(side, adv, ratio, log_ratio, log_dual)
        if coefficients is not None:
            tl.store(coefficients + at, coefficient, mask=there)
        if values is not None:
            tl.store(values + at, value, mask=there)
        sum_values += value
        tokens += token.to(tl.int32)
        if STATS:
            sums, most_kl, most_tv, most_own = _tally(
                sums, most_kl, most_tv, most_own, token, new, old, log_ratio, ratio, adv, coefficient, side, capped,
                own, FIXED, SIZE,
            )  # fmt: skip
    row = partial + tl.program_id(0) * WIDTH
    tl.store(row, tl.sum(sum_values))
    tl.store(row + 1, tl.sum(tokens).to(tl.float32))
    if STATS:
        tl.store(row + 2 + bins[:, None] * SIZE + bins[None, :], sums)
        place = row + 2 + SIZE * SIZE + bins
        tl.store(place, most_kl)
        tl.store(place + SIZE, most_tv)
        tl.store(place + 2 * SIZE, most_own)


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

    Returns the value (per token, or its sum over the tokens), and the totals of the columns of partial sums.
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
    ) -> tuple[Tensor, Tensor]:
        """Run the forward kernel and add up its rows of partial sums."""
        n, row, block = logps.numel(), logps.shape[-1] if logps.dim() else 1, STATS_BLOCK if stats else BLOCK
        by_row = row > 1 and (advantages.shape[-1] == 1 or advantages.stride(-1) == 0)
        adv = advantages[..., :1] if by_row else advantages
        blocks = triton.cdiv(n, block)
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
                WIDTH=width, SIZE=SIZE, BLOCK=block, num_warps=block // 128,
            )  # fmt: skip
        totals = partial.sum(0, dtype=torch.float64)  # counts above 2^24 stay exact
        if stats:
            totals[SUMS + SIZE * SIZE :] = partial[:, SUMS + SIZE * SIZE :].amax(0)
        ctx.save_for_backward(coefficients)
        ctx.dtype = logps.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(totals)
        return totals[VALUE].float() if values is None else values, totals

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


def as_stats(totals: Tensor) -> ClipStats:
    """Return the totals of the columns as `ClipStats`."""
    shape = (len(SIGNS), len(BUCKETS), -1)
    bins = len(SIGNS) * len(BUCKETS)
    sums = totals[SUMS : SUMS + SIZE * SIZE].view(SIZE, SIZE)[:bins, : len(FIELDS)]
    maxima = totals[SUMS + SIZE * SIZE :].view(len(MEASURES), SIZE)[:, :bins].T
    maxima = maxima + 0 * sums[:, -len(MEASURES) :]  # NaN where any is
    return ClipStats(sums.reshape(shape), maxima.reshape(shape))


def _flat(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1)


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
