"""Where p and q are next to 0 or 1: the divergence against 60 digits, gates against bounds, metrics finite."""

import math
import subprocess
import sys

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth.bounds import NAMES, F

import bandpo
from bandpo.operator.tokens import Move

OLD = (-1e4, -300.0, -100.0, -90.0, -80.0, -20.0, -3.0, -0.5, -1e-3, -1e-6)
NEW = (-2e4, -9995.0, -200.0, -99.0, -80.0, -20.0, -3.1, -1.0, -0.5, -0.25, -1e-3, -2e-6)
HUGE = 1e34  # where float32 ends a power of p has ended before


@pytest.mark.parametrize("digits", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_of_any_two_probabilities(name, dtype, digits):
    """Ratios far above e^80 and far below e^-80 included."""
    points = [(a, b) for a in OLD for b in NEW]
    old, new = (torch.tensor(column, dtype=dtype) for column in zip(*points, strict=True))
    got = bandpo.get_divergence(name).of(Move(new, old), digits=digits)
    assert torch.isfinite(got).all() and torch.equal(got, got.clamp(max=3e38))
    for value, a, b in zip(got.tolist(), old.tolist(), new.tolist(), strict=True):
        p, q = mp.exp(mp.mpf(a)), mp.exp(mp.mpf(b))
        exact = p * F[name](q / p) + (1 - p) * F[name]((1 - q) / (1 - p))
        if exact > HUGE:
            assert value > HUGE
        else:  # next to q = 1 float32 has few digits of (1 - q) / (1 - p)
            allowed = 1e-9 if dtype == torch.float64 else 2e-5 + 3e-7 * (1 - p) / (1 - q)
            assert abs(value - exact) <= allowed * exact + 1e-9, (a, b, value, float(exact))


@pytest.mark.parametrize("name", [*NAMES, "alpha:20", "alpha:-20", "alpha:0.7", "alpha:1.01"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nothing_makes_a_nan(name, dtype):
    logs = torch.tensor([-math.inf, -3e38, -6e4, -1e4, -200.0, -100.0, -1.0, -1e-3, -1e-7, 0.0]).to(dtype)
    old, new = (x.contiguous() for x in torch.meshgrid(logs, logs, indexing="ij"))
    assert torch.isfinite(bandpo.binary_divergence(new, old, name)).all()
    for sign in (1.0, -1.0):
        out = bandpo.policy_loss(new, old, torch.full((10,), sign).to(dtype), clip=bandpo.Band(name))
        assert torch.isfinite(out.loss) and all(torch.isfinite(value) for value in out.metrics.values())


def test_ratios_above_e_80_are_outside():
    for dtype in (torch.float32, torch.float64):
        for old in (-79.0, -81.0, -100.0, -1e3, -1e4, -math.inf):
            x, y = torch.tensor([[-1.0]], dtype=dtype, requires_grad=True), torch.tensor([[old]], dtype=dtype)
            for name in ("kl", "tv", "chi2", "hellinger", "js", "reverse_kl", "alpha:3", OWN):
                clip = bandpo.Band(name, delta=0.05)
                bandpo.policy_loss(x, y, torch.ones(1), clip=clip).loss.backward()
                assert x.grad == 0 and not bandpo.in_band(x.detach(), y, 0.05, name), (old, name)
                x.grad = None
            assert bandpo.binary_divergence(x.detach(), y).item() == pytest.approx(0.45867514538708193, rel=1e-6)


OWN = bandpo.Divergence("lecam", lambda u: (u - 1) ** 2 / (u + 1))


@pytest.mark.parametrize("name", [*NAMES, OWN], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_tokens_have_finite_metrics_and_keep_their_gradient(name, dtype):
    """A log-probability of exactly 0 is what a softmax gives for a token that is certain to within its rounding."""
    ulp = torch.finfo(dtype).eps
    old = torch.tensor([[-2 * ulp, -ulp, 0.0, 0.0, 0.0, -1.0]], dtype=dtype)
    new = torch.tensor([[0.0, 0.0, -2 * ulp, -ulp, 0.0, -1.0]], dtype=dtype)
    for clip in (bandpo.Band(name, delta=0.05), bandpo.get_clip("dgpo", region=bandpo.Band(name, delta=0.05))):
        for sign in (1.0, -1.0):
            metrics = bandpo.policy_loss(new, old, torch.full((1,), sign, dtype=dtype), clip=clip).metrics
            assert all(torch.isfinite(value) for value in metrics.values())
            assert metrics["zero_grad"] == 0 and metrics["divergence_max"] < 0.05


def test_the_certain_token_of_the_report():
    e = 2.0**-23
    for name in ("kl", "neyman"):
        metrics = bandpo.policy_loss(
            torch.tensor([[0.0, -1.0]]), torch.tensor([[-2 * e, -1.0]]), torch.ones(1), clip=bandpo.Band(name)
        ).metrics
        assert metrics["zero_grad_above"] == 0 and metrics["divergence_mean"] < 1e-5
    assert metrics["kl_mean"] == pytest.approx(4e-7, rel=0.2)


@pytest.mark.parametrize("name", [*NAMES, OWN], ids=str)
@given(log_p=st.floats(-200, -1e-5), share=st.floats(-1.5, 1.5), delta=st.floats(1e-6, 20.0), wide=st.booleans())
@settings(max_examples=60, deadline=None)
def test_gates_and_bounds_agree(name, log_p, share, delta, wide):
    """A little inside and a little outside of each bound, in the dtype's own terms."""
    dtype = torch.float64 if wide else torch.float32
    old = torch.tensor([log_p], dtype=dtype)
    bounds = bandpo.band(old, delta, name)
    bound = bounds.log_high if share > 0 else bounds.log_low
    log_r = abs(share) * bound
    new = old + log_r
    if new > 0 or log_r < -80 or bound == 0:
        return
    if share < 0 and not wide and log_p < -87:  # a lower bound is solved down to float32's least p, see `_continued`
        return
    near = 1e-2 if not wide else 1e-6  # float32 log-probabilities have that few digits of a small ratio
    gap = (new - old - bound).abs() / bound.abs()
    if gap < near or (new - old).abs() < 50 * torch.finfo(dtype).eps * old.abs():
        return
    assert bool(bandpo.in_band(new, old, delta, name)) == (abs(share) < 1)
    side = bandpo.Band(name, delta).side(bandpo.Tokens(new, old, torch.ones_like(old)))
    assert side.item() == (0 if abs(share) < 1 else math.copysign(1, share))


SWEEP = [10.0**k * m for k in range(-8, 4) for m in (1, 1.05, 3)] + [1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", [*NAMES, "alpha:-20", "alpha:1.001", "alpha:1.029", "alpha:0.99", "alpha:20", OWN], ids=str
)
def test_safe_for_every_radius_and_every_probability(name, dtype):
    x = -torch.exp(torch.linspace(math.log(1e-12), math.log(1e6), 1000, dtype=torch.float64))
    x = torch.cat([x, torch.tensor([0.0, -1e10, -1e30, -3e38, -math.inf, -690.0, -745.0, -87.5, -104.0]).double()])
    x, before = x.to(dtype), None
    for delta in SWEEP:
        bounds = bandpo.band(x, delta, name)
        low, high = bounds.log_low, bounds.log_high
        assert (torch.isfinite(low) & torch.isfinite(high) & (low <= 0) & (high >= 0) & (high <= -x)).all()
        assert before is None or ((low <= before[0]) & (high >= before[1])).all(), delta
        before = low, high
        for margin in bandpo.band_eps(x, delta, name):
            assert margin.dtype == torch.float32 and torch.isfinite(margin).all() and (margin >= 0).all()


DEFAULT_DEVICE = """
import torch
torch.set_default_device("meta")
import bandpo
own = bandpo.Divergence("own", lambda u: (u - 1) ** 2 / (u + 1))
x = torch.tensor([[-1.0, -2.0]], device="cpu")
for clip in bandpo.list_clips():
    needed = {name: -x for name in bandpo.get_clip(clip).needs}
    loss = bandpo.policy_loss(x, x - 0.1, x[:, 0], torch.ones_like(x), clip=clip, **needed)
    assert loss.loss.device.type == "cpu" and all(v.device.type == "cpu" for v in loss.metrics.values())
assert bandpo.band(x, 0.05, own).high.device.type == "cpu" and bandpo.certify(bandpo.band(x), x, 0.05).all()
bandpo.testing.check_divergence(own), bandpo.testing.check_clip("sapo"), bandpo.testing.check_clip("band")
assert bandpo.match_delta(bandpo.Fixed(), x) > 0
"""


def test_whatever_the_default_device_is():
    done = subprocess.run([sys.executable, "-c", DEFAULT_DEVICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
