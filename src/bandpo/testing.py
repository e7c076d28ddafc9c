"""The contract of divergences and clips, to run on your own: each check names what broke it, where, and the way out.

Everything here runs on the CPU, takes about a second and needs nothing but the core.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.clips import get_clip
from bandpo.clips.base import MOST, Clip, Region
from bandpo.clips.regions import Band
from bandpo.loss.policy import policy_loss
from bandpo.operator.band import Bounds, band
from bandpo.operator.certificate import certify
from bandpo.operator.divergence import Divergence
from bandpo.operator.family import get_divergence
from bandpo.operator.shape import read_shape
from bandpo.operator.tokens import Outcome, Tokens

DELTAS = (1e-4, 0.01, 0.05, 0.5, 5.0)


def check_divergence(divergence: str | Divergence) -> None:
    """Check that a divergence is one, and that everything it comes with agrees with its f.

    f: elementwise, finite on (0, inf), f(1) = 0, convex, not a straight line. `perspective`, `series` and `shape`: the
    same function. The bounds, its own or the solver's: finite, proven by `certify` to a relative
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
    with torch.device("cpu"):
        _check_divergence(get_divergence(divergence))


def _check_divergence(chosen: Divergence) -> None:
    shape = read_shape(chosen.name, chosen.f)
    if math.isinf(shape.at_zero) != math.isinf(chosen.shape.at_zero):
        raise _error(
            chosen, f"shape.at_zero={chosen.shape.at_zero:g}, but f(0) is {shape.at_zero:g}", "leave shape out"
        )
    _check_curved(chosen)
    _check_digits(chosen)
    for dtype, rtol in ((torch.float64, 1e-7), (torch.float32, 2e-5)):
        _check_bounds(chosen, dtype, rtol)


def check_clip(clip: object, simplex: bool | None = None) -> None:
    """Check that a clip is one.

    c: of the tokens' shape and dtype, detached, finite for every log-probability, 0 in padding whatever that holds, the
    same when it is asked twice; nothing that it is given is changed. c / r times r is c for |log r| <= 20. The gradient
    of `policy_loss` is -c. Of a `Region` also: its bounds are finite, low <= 1 <= high; `side` says what they say; the
    gradient is that of min(r A, clip(r) A).

    Args:
        clip: a name, a clip, or any object with `coefficient(tokens)`.
        simplex: of a region, whether high * p <= 1 is promised; for None only of a `Band`.

    Returns:
        None.

    Raises:
        InputError: the first check that fails: what, at which token, and the way out.

    Source: arXiv 1707.06347 for the objective of a region.
    """
    with torch.device("cpu"):
        _check_clip(get_clip(clip), simplex)


def _check_clip(chosen: Clip, simplex: bool | None) -> None:
    if isinstance(chosen, Region) and chosen.as_bounds:
        old = -torch.exp(torch.linspace(math.log(1e-6), math.log(60), 400, dtype=torch.float64))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            _check_interval(chosen, old.to(dtype), isinstance(chosen, Band) if simplex is None else simplex)
    _check_coefficient(chosen)
    if isinstance(chosen, Region):
        logps, old, advantages = _some_tokens()
        _check_sides(chosen, logps, old)
        _check_gradient(chosen, logps, old, advantages)


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
    """Compare `perspective` with f, with or without its tangent at u = 1, and `series` with what stands beside it."""
    near = divergence.radius * torch.tensor([-0.99, -0.7, -0.3, 0.3, 0.7, 0.99], dtype=torch.float64)
    rise = torch.cat([torch.expm1(torch.linspace(-20, 20, 400, dtype=torch.float64)), near]).sort().values
    u, p = 1 + rise, torch.full_like(rise, 0.25)
    want, outcome = divergence.f(u), Outcome(p, p * u, p * rise, torch.log(u))
    noise = 1e-9 * want.abs() + 1e-14 * (1 + u + want.abs())
    short = divergence.part(outcome, digits=False) / p
    slope = read_shape(divergence.name, divergence.f).slope
    bad, without = (~(x.abs() <= noise) for x in (short - want, short - want + slope * rise))
    if bad.any() and without.any():
        what = f"perspective is not p f(q / p) {_at('u', u, bad)}"
        raise _error(divergence, what, "correct perspective(outcome), or leave it out")
    bad = ~((divergence.part(outcome) / p - short).abs() <= noise)
    if bad.any():
        what = f"series is not f less its tangent {_at('u', u, bad)}"
        raise _error(divergence, what, "correct series, which starts at the square, or leave it out")


def _check_bounds(divergence: Divergence, dtype: torch.dtype, rtol: float) -> None:
    odds = torch.linspace(-14, 10, 121, dtype=torch.float64)
    log_p = torch.nn.functional.logsigmoid(odds).to(dtype)
    p, before = log_p.exp(), None
    seen = -math.inf if divergence.perspective else -680.0  # a bare f cannot be asked about ratios below 1e-300
    whose = "bounds" if divergence.bounds is not None else "the solver's bounds"
    way_out = (
        "correct bounds, or leave it out"
        if divergence.bounds is not None
        else "give perspective and series (digits of f)"
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


def _some_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Return logps, old_logps and advantages of 8 sequences: rare and likely tokens, ratios from 0.1 to 2."""
    old = -torch.exp(torch.linspace(math.log(1e-4), math.log(12), 320, dtype=torch.float64)).repeat(8, 1)
    turn = torch.arange(old.numel(), dtype=torch.float64).view_as(old)
    logps = torch.minimum(old + 0.7 * torch.sin(7.0 * turn) * (turn % 320 / 320), old / 50)
    return logps, old, torch.cos(turn)


HOSTILE = (-math.inf, -3e38, -1e4, -200.0, -100.0, -80.0, -1.0, -1e-3, -1e-7, 0.0)


def _check_coefficient(clip: Clip) -> None:
    """Everything that holds for every clip; see `check_clip`."""
    old = torch.tensor(HOSTILE)[:, None, None].expand(-1, len(HOSTILE), 2)
    new = torch.tensor(HOSTILE)[None, :, None].expand_as(old)
    advantages = torch.tensor([1.5, -0.5]).expand_as(old)
    new, old, advantages = (x.reshape(len(HOSTILE), -1).contiguous() for x in (new, old, advantages))
    _check_result(clip, "coefficient", clip.coefficient(_tokens(clip, new, old, advantages)), new, old)
    _check_result(clip, "advantages", clip.advantages(_tokens(clip, new, old, advantages)), new, old)
    logps, old, advantages = _some_tokens()
    mask, *padded = _padded(logps, old, advantages)
    copies = [x.clone() for x in padded]
    tokens = _tokens(clip, padded[0], padded[1], padded[2], mask)
    c, again = clip.coefficient(tokens), clip.coefficient(_tokens(clip, logps, old, advantages))
    n = logps.shape[-1]
    if not torch.allclose(c[:, :n], again, rtol=1e-9, atol=1e-12) or not bool((c[:, n:] == 0).all()):
        raise _wrong(clip, "coefficient depends on what stands in padding", "use the fields of tokens alone")
    if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(padded, copies, strict=True)):
        raise _wrong(clip, "coefficient changes its arguments", "make new tensors; none of tokens' may be written to")
    bad = ~((clip.advantages(tokens) * tokens.ratio - c).abs() <= 1e-6 * c.abs() + 1e-12) & (tokens.log_r.abs() <= MOST)
    if bad.any():
        raise _wrong(clip, f"advantages times r is not the coefficient {_place(tokens, bad)}", "leave advantages out")
    x = padded[0].requires_grad_()
    optional = _optional(clip, padded[1])
    loss = policy_loss(x, padded[1], padded[2], mask, clip=clip, aggregation="sum", **optional).loss
    (got,) = torch.autograd.grad(loss, x)
    bad = ~((got + c).abs() <= 1e-9 * c.abs() + 1e-12)
    if bad.any():
        raise _wrong(
            clip, f"the loss's gradient is not -c {_place(tokens, bad)}", "return a tensor of the tokens' shape"
        )


def _optional(clip: Clip, old: Tensor) -> dict[str, Any]:
    """Return the optional tensors that the clip asks for."""
    sign = torch.ones_like(old)
    sign[..., 1::2] = -1.0
    some = {
        "rollout_logps": old,
        "entropies": old.nan_to_num(0.0, 0.0, 0.0).abs(),
        "rewards": sign,
        "state_divergence": old.nan_to_num(0.0, 0.0, 0.0).abs() / 100,
    }
    return {name: some[name] for name in clip.needs}


def _tokens(clip: Clip, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tokens:
    return Tokens(new, old, advantages, mask, **_optional(clip, old))


def _wrong(clip: Clip, what: str, way_out: str) -> InputError:
    return InputError(f"clip {clip.name!r}: {what}; {way_out}")


def _place(tokens: Tokens, bad: Tensor) -> str:
    return f"at p = {float(tokens.p[bad][0]):.4g}, r = {float(tokens.ratio[bad][0]):.4g}"


def _check_result(clip: Clip, what: str, x: Tensor, new: Tensor, old: Tensor) -> None:
    if not isinstance(x, Tensor) or x.shape != new.shape or x.dtype != new.dtype or x.requires_grad:
        got = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise _wrong(clip, f"{what} of {new.dtype} tokens is {got}", "must be detached, of their shape and dtype")
    bad = ~torch.isfinite(x)
    if bad.any():
        where = ", ".join(f"{name} = {float(y[bad][0]):g}" for name, y in (("log p", old), ("log q", new)))
        raise _wrong(clip, f"{what} is {float(x[bad][0])} at {where}", "clamp what overflows or divides by 0")


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the mask of tokens that are followed by padding, and each tensor with junk in its padding."""
    junk = torch.tensor([math.nan, math.inf, -math.inf, 3.0], dtype=torch.float64).expand(len(tensors[0]), 4)
    mask = torch.cat([torch.ones_like(tensors[0]), torch.zeros_like(junk)], -1)
    return mask, *(torch.cat([x, junk], -1) for x in tensors)


def _away(bounds: Bounds, log_ratio: Tensor) -> Tensor:
    return torch.minimum((log_ratio - bounds.log_high).abs(), (log_ratio - bounds.log_low).abs()) > 1e-6


def _check_sides(clip: Region, logps: Tensor, old: Tensor) -> None:
    tokens = _tokens(clip, logps, old, torch.ones_like(old))
    bounds = clip.limits(tokens)
    want = (tokens.log_r > bounds.log_high).double() - (tokens.log_r < bounds.log_low).double()
    bad = (clip.side(tokens) != want) & _away(bounds, tokens.log_r)
    if bad.any():
        raise _wrong(clip, f"side disagrees with its bounds {_place(tokens, bad)}", "must be 1, -1 or 0 by them")


def _check_gradient(clip: Region, logps: Tensor, old: Tensor, advantages: Tensor) -> None:
    tokens, x = _tokens(clip, logps, old, advantages), logps.clone().requires_grad_()
    bounds, ratio = clip.limits(tokens), torch.exp(x - old)
    objective = torch.minimum(ratio * advantages, ratio.clamp(bounds.low, bounds.high) * advantages)
    (want,) = torch.autograd.grad(objective.sum(), x)
    bad = ((clip.coefficient(tokens) - want).abs() > 1e-9 * want.abs() + 1e-12) & _away(bounds, logps - old)
    if bad.any():
        raise _wrong(clip, f"c is not the gradient of min(r A, clip(r) A) {_place(tokens, bad)}", "mend side()")
