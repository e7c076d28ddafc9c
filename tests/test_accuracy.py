"""The operator against 60-digit arithmetic, the full convex problem and the identities of the method."""

import math

import cvxpy as cp
import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth.bounds import AT_ZERO, NAMES, F, cressie_read, exact_bounds

import bandpo

# Numbers that bfloat16 holds exactly, so that one exact answer serves every dtype.
LOG_P = [-80.0, -14.0, -7.5, -3.0, -1.0, -0.6875, -0.09375, -(2.0**-7), -(2.0**-13), -(2.0**-23)]
DELTAS = [1e-6, 1e-4, 0.01, 0.05, 0.3, 1.0, 10.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bounds_have_the_digits_promised(name, dtype):
    log_p = torch.tensor(LOG_P, dtype=dtype)
    for delta in DELTAS:
        bounds = bandpo.band(log_p, delta, name)
        assert bounds.log_low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        allowed = 1e-9 if dtype == torch.float64 else 5e-6
        for i, rounded in enumerate(log_p.tolist()):
            exact = exact_bounds(name, rounded, delta)
            for got, want in zip((bounds.log_low[i].item(), bounds.log_high[i].item()), exact, strict=True):
                if want == -mp.inf:
                    assert got <= -3e38
                elif want < -1e37:
                    assert got < -1e36  # saturates: the ratio is 0 for any use
                else:
                    assert abs(got - want) <= allowed * abs(want), (name, rounded, delta, got, float(want))


def test_the_table_of_the_method():
    p = torch.tensor([0.01, 0.02, 0.05, 0.08, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
    low = [0.0025, 0.0315, 0.162, 0.2617, 0.3128, 0.476, 0.571, 0.6915, 0.779, 0.8666, 0.9312]
    high = [7.81, 4.93, 2.98, 2.4106, 2.2008, 1.7177, 1.515, 1.3085, 1.184, 1.0764, 1.0101]
    bounds = bandpo.band(p.log(), delta=0.05)
    torch.testing.assert_close(bounds.low, torch.tensor(low), atol=1e-3, rtol=0)
    torch.testing.assert_close(bounds.high, torch.tensor(high), atol=6e-3, rtol=0)
    tail = bandpo.band(torch.tensor([-14.0, -1e-6]), delta=0.05)
    torch.testing.assert_close(tail.log_high, torch.tensor([10.97957, 1e-6]), rtol=1e-6, atol=0)
    torch.testing.assert_close(tail.log_low, torch.tensor([-60131.2, -0.0500108]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
@given(log_p=st.floats(-30, -1e-6), delta=st.floats(1e-5, 10), wider=st.floats(1.001, 3))
@settings(max_examples=25, deadline=None)
def test_identities(name, log_p, delta, wider):
    """Mirror identity, the bounds are roots, monotone in p and delta, inside the simplex."""
    x = torch.tensor([log_p, 1.5 * log_p], dtype=torch.float64)
    bounds, wide = bandpo.band(x, delta, name), bandpo.band(x, wider * delta, name)
    assert (wide.log_low <= bounds.log_low).all() and (wide.log_high >= bounds.log_high).all()
    assert bounds.log_high[1] >= bounds.log_high[0] and bounds.log_low[1] <= bounds.log_low[0]
    assert (bounds.log_low <= 0).all() and (bounds.log_high >= 0).all() and (bounds.log_high + x <= 0).all()
    if log_p > -1e-4:
        return  # 1 - p is too coarse in float64 for the two checks below
    rest = torch.log(-torch.expm1(x))
    mirrored = bandpo.band(rest, delta, name).high
    torch.testing.assert_close(bounds.low * x.exp(), 1 - rest.exp() * mirrored, atol=1e-9, rtol=1e-6)
    for log_r in (bounds.log_low, bounds.log_high):
        g = bandpo.binary_divergence(x + log_r, x, name)
        saturated = (log_r + x > -1e-9) | (log_r < -700)
        torch.testing.assert_close(g[~saturated], torch.full_like(g, delta)[~saturated], rtol=1e-5, atol=1e-9)
        assert (g[saturated] <= delta * (1 + 1e-5)).all() or name == "kl"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "alpha:-1.5"])  # there the solver loses its digits
def test_the_full_problem_over_the_simplex(name):
    """Extremes of one action's ratio over all distributions in the trust region, by a convex solver."""
    rng = np.random.default_rng(0)
    for n, delta in ((3, 0.05), (10, 0.2), (50, 0.01)):
        old = rng.dirichlet(np.full(n, 0.7)) * 0.9 + 0.1 / n
        new = cp.Variable(n, nonneg=True)
        divergence = {
            "kl": lambda new=new, old=old: cp.sum(cp.kl_div(old, new)),
            "tv": lambda new=new, old=old: cp.norm1(new - old) / 2,
            "chi2": lambda new=new, old=old: cp.sum_squares(cp.multiply(old**-0.5, new - old)),
            "reverse_kl": lambda new=new, old=old: cp.sum(cp.kl_div(new, old)),
            "neyman": lambda new=new, old=old: cp.sum(cp.multiply(old**2, cp.inv_pos(new))) - 1,
            "hellinger": lambda new=new, old=old: 2 - 2 * cp.sum(cp.multiply(old**0.5, cp.sqrt(new))),
            "js": lambda new=new, old=old: cp.sum(cp.kl_div(new, (new + old) / 2) + cp.kl_div(old, (new + old) / 2)),
            "alpha:0.3": lambda new=new, old=old: (
                (cp.sum(cp.multiply(old**0.7, cp.power(new, 0.3, approx=False))) - 1) / (0.3 * -0.7)
            ),
            "alpha:-1.5": lambda new=new, old=old: (
                (cp.sum(cp.multiply(old**2.5, cp.power(new, -1.5, approx=False))) - 1) / 3.75
            ),
            "alpha:3": lambda new=new, old=old: (cp.sum(cp.multiply(old**-2, cp.power(new, 3, approx=False))) - 1) / 6,
        }[name]()
        action = int(rng.integers(n))
        region = [divergence <= delta, cp.sum(new) == 1]
        ends = []
        for goal in (cp.Minimize(new[action]), cp.Maximize(new[action])):
            cp.Problem(goal, region).solve(solver=cp.CLARABEL)
            ends.append(new.value[action] / old[action])
        bounds = bandpo.band(torch.tensor([old[action]], dtype=torch.float64).log(), delta, name)
        np.testing.assert_allclose([bounds.low.item(), bounds.high.item()], ends, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_your_own_f_finds_the_built_in_bounds(name):
    mine = bandpo.Divergence("mine", bandpo.get_divergence(name).f)
    log_p = torch.linspace(-6, -0.05, 40, dtype=torch.float64)
    for delta in (0.01, 0.3):
        ours, theirs = bandpo.band(log_p, delta, mine), bandpo.band(log_p, delta, name)
        torch.testing.assert_close(ours.low, theirs.low, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(ours.high, theirs.high, atol=1e-9, rtol=1e-7)
        logps = log_p + 0.3 * torch.sin(17 * log_p)
        logps.clamp_(max=-1e-3)
        g = bandpo.binary_divergence(logps, log_p, mine)
        torch.testing.assert_close(g, bandpo.binary_divergence(logps, log_p, name), rtol=1e-9, atol=1e-14)


# name: (f in torch, f in 60 digits, f(0) where it is finite); with kinks, with a slope at 1, flat around 1
OWN = {
    "lecam": (lambda u: (u - 1) ** 2 / (u + 1), lambda u: (u - 1) ** 2 / (u + 1), 1),
    "u log u": (lambda u: u * torch.log(u), lambda u: u * mp.log(u), 0),
    "-log u": (lambda u: -torch.log(u), lambda u: -mp.log(u), None),
    "jeffreys": (lambda u: (u - 1) * torch.log(u), lambda u: (u - 1) * mp.log(u), None),
    "huber": (
        lambda u: torch.where((u - 1).abs() < 0.2, (u - 1) ** 2 / 2, (u - 1).abs() / 5 - 0.02),
        lambda u: (u - 1) ** 2 / 2 if abs(u - 1) < 0.2 else abs(u - 1) / 5 - mp.mpf("0.02"),
        mp.mpf("0.18"),
    ),
    "skew": (lambda u: torch.maximum(3 * (u - 1), 1 - u), lambda u: max(3 * (u - 1), 1 - u), 1),
    "hockey stick": (lambda u: (u - 2).clamp(min=0), lambda u: max(u - 2, mp.mpf(0)), 0),
    "bent above": (
        lambda u: (u - 1) ** 2 / (u + 1) + 3 * (u - 2).clamp(min=0),
        lambda u: (u - 1) ** 2 / (u + 1) + 3 * max(u - 2, mp.mpf(0)),
        1,
    ),
    "steeply bent below": (
        lambda u: (u - 1) ** 2 / 1000 + 30 * (0.9 - u).clamp(min=0),
        lambda u: (u - 1) ** 2 / 1000 + 30 * max(mp.mpf(0.9) - u, mp.mpf(0)),
        mp.mpf("0.001") + 30 * mp.mpf(0.9),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_any_f_is_solved_as_far_as_it_has_digits(name, monkeypatch):
    f, exact, at_zero = OWN[name]
    mine = bandpo.Divergence(name, f)
    monkeypatch.setitem(F, name, exact)
    if at_zero is not None:
        monkeypatch.setitem(AT_ZERO, name, at_zero)
    log_p = torch.tensor([-30.0, -7.5, -1.0, -0.6875, -0.09375, -(2.0**-13)])
    for delta in (1e-4, 0.05, 1.0):
        bounds = bandpo.band(log_p, delta, mine)
        for i, x in enumerate(log_p.tolist()):
            for got, want in zip((bounds.log_low[i], bounds.log_high[i]), exact_bounds(name, x, delta), strict=True):
                if want > -600:  # beyond, u is 0 in any arithmetic
                    assert abs(got.item() - want) <= 5e-6 * abs(want), (x, delta, got.item(), float(want))


@pytest.mark.parametrize("name", ["reverse_kl", "alpha:1.01", "alpha:0.99", "js", "alpha:3", "kl"])
def test_upper_bounds_of_the_rarest_tokens(name, monkeypatch):
    """Down to log p = -1e4, where p itself underflows and u log u is no power of u."""
    if name not in F:
        monkeypatch.setitem(F, name, cressie_read(mp.mpf(name.removeprefix("alpha:"))))
        monkeypatch.setitem(AT_ZERO, name, 1 / mp.mpf(name.removeprefix("alpha:")))
    for dtype in (torch.float32, torch.float64):
        log_p = torch.tensor([-9984.0, -3000.0, -1000.0, -700.0, -200.0, -87.5], dtype=dtype)
        for delta in (1e-6, 0.05, 20.0):
            got = bandpo.band(log_p, delta, name).log_high.tolist()
            for x, high in zip(log_p.tolist(), got, strict=True):
                assert abs(high / exact_bounds(name, x, delta)[1] - 1) < 1e-6, (x, delta, high)


@pytest.mark.parametrize(
    "name", ["js", "reverse_kl", "alpha:0.5", "alpha:-1.5", "alpha:3", "alpha:10", "lecam", "-log u"]
)
@pytest.mark.parametrize("delta", [1e-6, 0.05, (0.3, 0.01), 20.0], ids=str)
def test_many_tokens_at_one_radius_have_the_digits_of_each_alone(name, delta):
    """Where interpolation takes over: against the solver in float64, which is held to 60 digits above."""
    divergence = bandpo.Divergence(name, OWN[name][0]) if name in OWN else name
    torch.manual_seed(0)
    log_p = -torch.exp(torch.empty(40_000).uniform_(math.log(1e-7), math.log(1000)))
    edge = torch.log(1e-6 * torch.linspace(0.501, 3, 1000))  # where ratio 0 comes within reach at delta 1e-6
    log_p = torch.cat([log_p, edge]).view(200, 205)
    many, alone = bandpo.band(log_p, delta, divergence), bandpo.band(log_p.double(), delta, divergence)
    lowest = -60.0  # below, the ratio is 0 for any use
    pairs = (many.log_low.clamp(min=lowest), alone.log_low.clamp(min=lowest)), (many.log_high, alone.log_high)
    for got, want in pairs:
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=0)
    assert (many.log_high + log_p <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_safe_on_many_tokens_and_on_garbage(name, dtype):
    torch.manual_seed(0)
    many = 100_000 if bandpo.get_divergence(name).bounds is None else 500_000
    x = -torch.exp(torch.empty(many).uniform_(math.log(1e-7), math.log(1e4)))
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 5.0, -1e30])
    x = torch.cat([x, garbage]).to(dtype)
    previous = None
    for delta in (1e-6, 0.05, 20.0):
        bounds = bandpo.band(x, delta, name)
        assert torch.isfinite(bounds.log_low).all() and torch.isfinite(bounds.log_high).all()
        assert (bounds.log_low <= 0).all() and (bounds.log_high >= 0).all()
        p = x.to(bounds.log_low.dtype).nan_to_num(nan=0.0).clamp(max=0)
        assert (bounds.log_high <= -p).all()
        if previous is not None:
            assert (bounds.log_low <= previous.log_low).all() and (bounds.log_high >= previous.log_high).all()
        previous = bounds
        eps_low, eps_high = bandpo.band_eps(x, delta, name, cap=None)
        assert eps_low.dtype == eps_high.dtype == torch.float32
        assert ((eps_low >= 0) & (eps_low <= 1)).all() and (eps_high >= 0).all() and torch.isfinite(eps_high).all()


@pytest.mark.parametrize("name", NAMES)
def test_in_band_agrees_with_the_bounds(name):
    log_p = torch.linspace(-9, -0.02, 300, dtype=torch.float64)
    for delta in (0.01, (0.01, 0.2), torch.full((300,), 0.05, dtype=torch.float64)):
        bounds = bandpo.band(log_p, delta, name)
        low = bounds.log_low.clamp(min=-30)
        assert bandpo.in_band(log_p + 0.999 * low, log_p, delta, name).all()
        assert bandpo.in_band(log_p + 0.999 * bounds.log_high, log_p, delta, name).all()
        escapes = bounds.log_low > -30
        assert not bandpo.in_band(log_p + 1.001 * low, log_p, delta, name)[escapes].any()
        over = log_p + 1.001 * bounds.log_high
        assert not bandpo.in_band(over, log_p, delta, name)[over < 0].any()


def test_cap_pair_and_broadcast():
    log_p = torch.full((2, 3), -6.0)
    assert bandpo.band(log_p, 0.05, cap=10).high.eq(10).all()
    pair = bandpo.band(log_p, (0.01, 0.2))
    torch.testing.assert_close(pair.log_low, bandpo.band(log_p, 0.01).log_low)
    torch.testing.assert_close(pair.log_high, bandpo.band(log_p, 0.2).log_high)
    each = bandpo.band(log_p, torch.tensor([[0.01], [0.2]]))
    torch.testing.assert_close(each.log_high[1], pair.log_high[1])


@pytest.mark.parametrize("name", ["kl", "hellinger", "js"])
@pytest.mark.parametrize("many", [(256, 512), (48, 512)], ids=str)  # in pieces, in one
def test_a_batch_is_its_rows(name, many):
    """However many tokens, in whatever layout, with radii of whatever shape: as its rows two at a time."""
    torch.manual_seed(0)
    rows, columns = many
    log_p = torch.log(torch.rand(columns, rows)).clamp(max=-1e-4).t()  # not contiguous
    row, column = torch.rand(rows, 1) / 5 + 0.01, torch.rand(columns) / 5 + 0.01
    for delta in (0.05, (0.01, 0.2), row, column, (row, 0.05), (0.05, column), (row, column)):
        whole = bandpo.band(log_p, delta, name)
        first = tuple(d[:2] if d is row else d for d in (delta if isinstance(delta, tuple) else (delta, delta)))
        part = bandpo.band(log_p[:2], first if isinstance(delta, tuple) else first[0], name)
        torch.testing.assert_close(whole.log_high[:2], part.log_high, rtol=3e-6, atol=0)
        torch.testing.assert_close(whole.log_low[:2].clamp(min=-60), part.log_low.clamp(min=-60), rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_implied_delta_turns_bounds_back_into_radii(name):
    log_p = torch.linspace(-6, -0.1, 50, dtype=torch.float64)
    bounds = bandpo.band(log_p, (0.01, 0.02), name)
    low, high = bandpo.implied_delta(bounds.log_low, bounds.log_high, log_p, name)
    inside = bounds.log_high + log_p < -1e-6  # where the region ends within the simplex
    torch.testing.assert_close(high[inside], torch.full_like(high, 0.02)[inside], rtol=1e-7, atol=0)
    reached = bounds.log_low > -30
    torch.testing.assert_close(low[reached], torch.full_like(low, 0.01)[reached], rtol=1e-7, atol=0)


def test_implied_radii_of_the_fixed_clip():
    """TV: p eps. chi2: p eps^2 / (1 - p)."""
    log_p = torch.log(torch.tensor([0.05, 0.5], dtype=torch.float64))
    fixed = bandpo.Fixed(0.2, 0.28).bounds(log_p)
    p = log_p.exp()
    for name, radius in (("tv", lambda e: p * e), ("chi2", lambda e: p * e**2 / (1 - p))):
        low, high = bandpo.implied_delta(fixed.log_low, fixed.log_high, log_p, name)
        torch.testing.assert_close(low, radius(0.2))
        torch.testing.assert_close(high, radius(0.28))
