"""The contract of divergences and clips, to run on your own: each check names what broke it, where, and the way out.

Everything here runs on the CPU, takes about a second and needs nothing but the core.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bandpo._checks import InputError
from bandpo.bounds import Bounds, band
from bandpo.certificate import certify
from bandpo.clips import Band, Region
from bandpo.divergences import Divergence
from bandpo.family import get_divergence
from bandpo.loss import policy_loss
from bandpo.move import Move
from bandpo.shape import read_shape

DELTAS = (1e-4, 0.01, 0.05, 0.5, 5.0)


def check_divergence(divergence: str | Divergence) -> None:
    """Check that a divergence is one, and that everything it comes with agrees with its f.

    f: elementwise, finite on (0, inf), f(1) = 0, convex, not a straight line. `term`, `series` and `shape`: the same
    function. `binary`: the same g_f. The bounds, its own or the solver's: finite, proven by `certify` to a relative
    1e-7 in float64 and 2e-5 in float32, wider with delta, narrower for likelier tokens, and equal to their mirror
    image.

    Args:
        divergence: a name or a `Divergence`.

    Returns:
        None.

    Raises:
        InputError: the first check that fails: what, at which u or p, and the way out.

    Source: arXiv 2603.04918, section 3.
    """
    chosen = get_divergence(divergence)
    shape = read_shape(chosen.name, chosen.f)
    if math.isinf(shape.at_zero) != math.isinf(chosen.shape.at_zero):
        raise _error(
            chosen, f"shape.at_zero={chosen.shape.at_zero:g}, but f(0) is {shape.at_zero:g}", "leave shape out"
        )
    _check_curved(chosen)
    _check_digits(chosen)
    _check_binary(chosen)
    for dtype, rtol in ((torch.float64, 1e-7), (torch.float32, 2e-5)):
        _check_bounds(chosen, dtype, rtol)


def check_clip(clip: Region, simplex: bool | None = None) -> None:
    """Check that a clip is one: its bounds, its sides and the gradient that they leave.

    Bounds: of the tokens' shape, float32 (float64 for float64), detached, finite, low <= 1 <= high. `outside` says what
    the bounds say. Through `policy_loss`: the gradient is that of min(r A, clip(r) A), and padding is inert whatever it
    holds.

    Args:
        clip: the region.
        simplex: whether high * p <= 1 is promised; for None only of a `Band`.

    Returns:
        None.

    Raises:
        InputError: the first check that fails: what, at which token, and the way out.

    Source: arXiv 1707.06347 for the objective.
    """
    if not isinstance(clip, Region):
        raise InputError(f"clip={clip!r}: must be a bandpo.Region; derive yours from it")
    old = -torch.exp(torch.linspace(math.log(1e-6), math.log(60), 400, dtype=torch.float64))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        _check_interval(clip, old.to(dtype), isinstance(clip, Band) if simplex is None else simplex)
    old = old[old > -12].repeat(8)
    logps = torch.minimum(old + 0.7 * torch.sin(7.0 * torch.arange(len(old), dtype=torch.float64)), old / 50)
    _check_sides(clip, logps, old)
    _check_gradient(clip, logps, old)


def _error(divergence: Divergence, what: str, way_out: str) -> InputError:
    return InputError(f"Divergence {divergence.name!r}: {what}; {way_out}")


def _at(name: str, x: Tensor, bad: Tensor) -> str:
    return f"at {name} = {float(x.expand(bad.shape)[bad].flatten()[0]):.4g}"


def _check_curved(divergence: Divergence) -> None:
    u = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    low, middle, high = map(float, divergence.f(u))
    if (10 * low + high) / 11 - middle <= 1e-9:  # 1 = (10 * 0.1 + 10) / 11
        raise _error(divergence, "f is a straight line: it measures nothing", "give an f that is curved at u = 1")


def _check_digits(divergence: Divergence) -> None:
    """Compare `term` with f, with or without its tangent at u = 1, and `series` with what stands beside it."""
    near = divergence.radius * torch.tensor([-0.99, -0.7, -0.3, 0.3, 0.7, 0.99], dtype=torch.float64)
    rise = torch.cat([torch.expm1(torch.linspace(-20, 20, 400, dtype=torch.float64)), near]).sort().values
    u = 1 + rise
    want = divergence.f(u)
    noise = 1e-9 * want.abs() + 1e-14 * (1 + u + want.abs())
    if divergence.term is not None:
        off = divergence.term(torch.log(u), rise) - want
        slope = read_shape(divergence.name, divergence.f).slope
        bad, without = (~(x.abs() <= noise) for x in (off, off + slope * rise))
        if bad.any() and without.any():
            raise _error(divergence, f"term is not f {_at('u', u, bad)}", "correct term(log u, u - 1), or leave it out")
    short, long = (divergence.value(torch.log(u), rise, digits=digits) for digits in (False, True))
    bad = ~((long - short).abs() <= noise)
    if bad.any():
        what = f"series is not f less its tangent {_at('u', u, bad)}"
        raise _error(divergence, what, "correct series, which starts at the square, or leave it out")


def _check_binary(divergence: Divergence) -> None:
    if divergence.binary is None:
        return
    log_p = torch.linspace(-12, -1e-3, 60, dtype=torch.float64)[:, None]
    logps = torch.minimum(log_p + torch.linspace(-6, 6, 61, dtype=torch.float64), log_p / 50)
    old = log_p.expand_as(logps).contiguous()
    want = dataclasses.replace(divergence, binary=None).of(Move(logps, old))
    bad = ~((divergence.binary(Move(logps, old)) - want).abs() <= 1e-6 * want.abs() + 1e-12)
    if bad.any():
        where = f"{_at('p', old.exp(), bad)}, {_at('r', (logps - old).exp(), bad)[3:]}"
        raise _error(divergence, f"binary is not g_f {where}", "correct binary, or leave it out")


def _check_bounds(divergence: Divergence, dtype: torch.dtype, rtol: float) -> None:
    odds = torch.linspace(-14, 10, 121, dtype=torch.float64)
    log_p = torch.nn.functional.logsigmoid(odds).to(dtype)
    p, before = log_p.exp(), None
    seen = -math.inf if divergence.term else -680.0  # a bare f cannot be asked about ratios below 1e-300
    whose = "bounds" if divergence.bounds is not None else "the solver's bounds"
    way_out = (
        "correct bounds, or leave it out" if divergence.bounds is not None else "give term and series (digits of f)"
    )

    def check(good: Tensor, what: str) -> None:
        if not bool(good.all()):
            raise _error(divergence, f"{whose} {what}, {dtype}, delta {delta:g}, {_at('p', p, ~good)}", way_out)

    for delta in DELTAS:
        bounds = band(log_p, delta, divergence)
        low, high = bounds.log_low.clamp(min=seen), bounds.log_high
        check(torch.isfinite(bounds.log_low) & torch.isfinite(high), "are not finite")
        slack = 10 * rtol
        rising, falling = low.diff() >= slack * low[:-1], high.diff() <= slack * high[:-1]
        start = torch.ones(1, dtype=torch.bool)
        check(torch.cat([start, rising & falling]), "widen as p rises")
        if before is not None:
            check((low <= before.log_low) & (high >= before.log_high), "narrow as delta rises")
        proof = certify(bounds, log_p, delta, divergence, rtol=rtol)
        check(proof.holds_low | (low <= seen), "are not the least ratio with g_f <= delta")
        check(proof.holds_high, "are not the greatest ratio with g_f <= delta")
        if dtype == torch.float64:
            other = torch.nn.functional.logsigmoid(-odds)
            mirror = 1 - other.exp() * band(other, delta, divergence).high
            check((bounds.low * p - mirror).abs() <= 1e-7, "break the mirror identity p low(p) = 1 - (1-p) high(1-p)")
        before = Bounds(low, high)


def _check_interval(clip: Region, old: Tensor, simplex: bool) -> None:
    bounds, name, want = clip.bounds(old.clone().requires_grad_()), type(clip).__name__, torch.float32
    want = torch.float64 if old.dtype == torch.float64 else want
    if not isinstance(bounds, Bounds):
        raise InputError(f"{name}.bounds returns {type(bounds).__name__}: must return bandpo.Bounds(log_low, log_high)")
    for side, x in (("log_low", bounds.log_low), ("log_high", bounds.log_high)):
        if x.shape != old.shape or x.dtype != want or x.requires_grad:
            got = f"{x.dtype}, shape {tuple(x.shape)}, requires_grad={x.requires_grad}"
            raise InputError(
                f"{name}.bounds: {side} of {old.dtype} tokens is {got}: must be {want} of the tokens' shape, detached"
            )
    p = old.to(want).exp()
    rules = {
        "must be finite log-ratios": torch.isfinite(bounds.log_low) & torch.isfinite(bounds.log_high),
        "must have low <= 1 <= high": (bounds.log_low <= 0) & (bounds.log_high >= 0),
    }
    if simplex:
        rules["must have high * p <= 1; clamp log_high to -old_logps"] = bounds.log_high + old.to(want) <= 0
    for rule, good in rules.items():
        if not bool(good.all()):
            raise InputError(f"{name}.bounds: {rule}, but not {_at('p', p, ~good)}, {old.dtype}")


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the mask of tokens that are followed by padding, and each tensor with junk in its padding."""
    junk = torch.tensor([math.nan, math.inf, -math.inf, 3.0], dtype=torch.float64)
    mask = torch.cat([torch.ones_like(tensors[0]), torch.zeros_like(junk)])
    return mask, *(torch.cat([x, junk]) for x in tensors)


def _away(bounds: Bounds, log_ratio: Tensor) -> Tensor:
    return torch.minimum((log_ratio - bounds.log_high).abs(), (log_ratio - bounds.log_low).abs()) > 1e-6


def _check_sides(clip: Region, logps: Tensor, old: Tensor) -> None:
    bounds, log_ratio, name = clip.bounds(old), logps - old, type(clip).__name__
    want = (log_ratio > bounds.log_high).double() - (log_ratio < bounds.log_low).double()
    mask, padded, padded_old = _padded(logps, old)
    for want_reached in (False, True):
        out, reached = clip.outside(Move(padded, padded_old, mask), want_reached)
        bad = (out[: len(old)] != want) & _away(bounds, log_ratio)
        if bad.any():
            where = f"{_at('p', old.exp(), bad)}, {_at('r', log_ratio.exp(), bad)[3:]}"
            raise InputError(f"{name}.outside disagrees with its bounds {where}: must be 1, -1 or 0 by them")
        if not bool((out[len(old) :] == 0).all()):
            raise InputError(f"{name}.outside is not 0 in padding: take r from the move, which is 1 there")
    if reached is None or reached.shape != mask.shape or not bool((reached[: len(old)] >= 0).all()):
        raise InputError(f"{name}.outside with want_reached must return the divergence too; use self.measure.of(move)")


def _check_gradient(clip: Region, logps: Tensor, old: Tensor) -> None:
    advantages = torch.cos(torch.arange(len(old), dtype=torch.float64))
    bounds, x = clip.bounds(old), logps.clone().requires_grad_()
    ratio = torch.exp(x - old)
    clipped = ratio.clamp(bounds.low, bounds.high)
    (want,) = torch.autograd.grad(-torch.minimum(ratio * advantages, clipped * advantages).sum(), x)
    mask, y, padded_old, padded_advantages = _padded(logps, old, advantages)
    loss = policy_loss(y.requires_grad_(), padded_old, padded_advantages, mask, clip=clip, aggregation="sum").loss
    (got,) = torch.autograd.grad(loss, y)
    bad = ((got[: len(old)] - want).abs() > 1e-9 * want.abs() + 1e-12) & _away(bounds, logps - old)
    if bad.any() or not bool(torch.isfinite(loss)) or not bool((got[len(old) :] == 0).all()):
        where = f"{_at('p', old.exp(), bad)}, {_at('r', ratio.detach(), bad)[3:]}" if bad.any() else "in padding"
        raise InputError(
            f"{type(clip).__name__}: the gradient is not that of min(r A, clip(r) A) {where}; mend outside()"
        )
