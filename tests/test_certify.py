"""The certificate: its rounding bound against 60 digits, that it holds for the exact bounds, and that it can fail."""

import math

import mpmath as mp
import pytest
import torch
from truth.bounds import NAMES, F

import bandpo
from bandpo.operator.certificate import evaluate

DELTAS = [1e-3, 0.05, 0.3, 10.0]


def log_p(many, dtype):
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(many, generator=generator, dtype=torch.float64)
    return -torch.exp(math.log(1e-7) + spread * math.log(80 / 1e-7)).to(dtype)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_rounding_error_is_below_its_bound(name, bare):
    divergence = bandpo.get_divergence(name)
    divergence = bandpo.Divergence("bare", divergence.f) if bare else divergence
    generator = torch.Generator().manual_seed(1)
    x, (t, side, kind) = log_p(200, torch.float64), torch.rand(3, 200, generator=generator, dtype=torch.float64)
    fall, near, far = -torch.exp(16 * t - 12), -x * torch.exp(-14 * t), -x * (1 - torch.exp(-30 * t) / 2)
    log_ratio = torch.where(side < 0.4, fall, torch.where(kind < 0.5, near, far))
    value, rounding = evaluate(divergence, x, log_ratio)
    for a, b, got, allowed in zip(x.tolist(), log_ratio.tolist(), value.tolist(), rounding.tolist(), strict=True):
        if b < -a and math.isfinite(got):
            p, r = mp.exp(mp.mpf(a)), mp.exp(mp.mpf(b))
            exact = p * F[name](r) + (1 - p) * F[name]((1 - r * p) / (1 - p))
            assert abs(got - exact) <= allowed, (a, b, got, float(exact))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 4e-6), (torch.float64, 5e-11), (torch.bfloat16, 4e-6)])
def test_the_bounds_are_proven_for_every_token(name, dtype, rtol):
    x = log_p(5000, dtype)
    for delta, cap in [*((delta, None) for delta in DELTAS), (0.05, 10.0)]:
        proof = bandpo.certify(bandpo.band(x, delta, name, cap), x, delta, name, cap, rtol=rtol)
        assert proof.all(), (delta, cap, x[~proof.holds][:3])
    loose = 7e-5 if dtype != torch.float64 else rtol
    assert bandpo.certify(bandpo.band(x, 1e-6, name), x, 1e-6, name, rtol=loose).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_that_are_off_by_a_hair_are_not(name, dtype):
    """Off by a relative 1e-5 of the log-ratio, or of a radius off by a thousandth, or with a cap that is not there."""
    x = torch.linspace(-6, -0.05, 500, dtype=dtype)
    for delta in (1e-3, 0.01, 0.05):
        bounds = bandpo.band(x, delta, name)
        upper = bounds.log_high + x < -0.01  # where the bound is the simplex's end, no radius has a part in it
        for hair, least in ((1e-5, -0.4), (1e-2, -6.0)):  # the nearer to ratio 0, the less delta depends on log_low
            lower = bounds.log_low > least
            assert lower.any() and upper.any()
            for scale in (1 - hair, 1 + hair):
                off = bandpo.certify(bandpo.Bounds(bounds.log_low * scale, bounds.log_high * scale), x, delta, name)
                assert not off.holds_low[lower].any() and not off.holds_high[upper].any()
                assert not off.holds_high[bounds.log_high == -x].any()  # past the simplex or short of its end
        for other in (0.999 * delta, 1.001 * delta):
            off = bandpo.certify(bounds, x, other, name)
            assert not off.holds_low[lower].any() and not off.holds_high[upper].any()
        capped = bandpo.band(x, delta, name, cap=1.1)
        assert not bandpo.certify(capped, x, delta, name).all()
        assert not bandpo.certify(bounds, x, delta, name, cap=1.1).all()


def test_a_lower_bound_that_falsely_saturates_is_found():
    x = torch.tensor([-14.0])
    exact = bandpo.band(x, 0.05)
    assert bandpo.certify(exact, x, 0.05).all()
    for false in (-3e38, -1000.0):  # ratio 0, and one that only log space tells from 0; the exact one is e^-60131
        proof = bandpo.certify(bandpo.Bounds(torch.full_like(x, false), exact.log_high), x, 0.05)
        assert not proof.holds_low.any() and proof.holds_high.all()


def test_the_enclosure_pairs_masks_and_what_it_cannot_see():
    x = torch.tensor([-3.0, -0.5, math.nan, -800.0])
    bounds = bandpo.band(x, (0.01, 0.2))
    proof = bandpo.certify(bounds, x, (0.01, 0.2))
    assert proof.holds.tolist() == [True, True, True, False]
    assert proof.all(torch.tensor([1, 1, 1, 0])) and not proof.all()
    assert (proof.outside_low < bounds.log_low).all() and (bounds.log_low < proof.inside_low).all()
    assert proof.inside_low.dtype == torch.float64 and proof.rtol == 4e-6
    each = torch.tensor([0.01, 0.2, 0.1, 0.1])
    assert bandpo.certify(bandpo.band(x, each), x, each).holds[:2].all()
    fixed = bandpo.certify(bandpo.Fixed().bounds(x), x, 0.05)
    assert not fixed.holds[:2].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"old_logps": torch.zeros(3)}, "bounds.log_low has shape (2,)"),
        ({"old_logps": [0.0]}, "old_logps is list"),
        ({"delta": 0}, "delta=0"),
        ({"divergence": "kll"}, "did you mean 'kl'"),
        ({"cap": 0.5}, "cap=0.5"),
        ({"rtol": -1}, "rtol=-1"),
    ],
)
def test_bad_input_is_one_line(change, words):
    x = torch.full((2,), -1.0)
    arguments = {"bounds": bandpo.band(x), "old_logps": x, "delta": 0.05} | change
    with pytest.raises(bandpo.InputError) as caught:
        bandpo.certify(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
