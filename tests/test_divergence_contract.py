"""The public contract: every built-in passes, your own pass, and each way to break it is named."""

import dataclasses
import math

import pytest
import torch

import bandpo
from bandpo.operator.family import FAMILY
from bandpo.operator.shape import read_shape
from bandpo.testing import check_clip, check_divergence

CHI2, JS, KL = (bandpo.get_divergence(name) for name in ("chi2", "js", "kl"))
OWN = {
    "lecam": lambda u: (u - 1) ** 2 / (u + 1),
    "plain reverse_kl": lambda u: u * torch.log(u),  # slope 1 at u = 1, and 0 * inf at 0
    "plain kl": lambda u: -torch.log(u),
    "jeffreys": lambda u: (u - 1) * torch.log(u),
    "twice tv": lambda u: (u - 1).abs(),
    "bent": lambda u: (u - 1) ** 2 / (u + 1) + 3 * (u - 2).clamp(min=0),
    "hockey stick": lambda u: (u - 2).clamp(min=0),
}
ALPHAS = ["alpha:0.3", "alpha:-1.5", "alpha:3"]


@pytest.mark.parametrize("name", [*FAMILY, *ALPHAS, *OWN])
def test_every_divergence_keeps_the_contract(name):
    check_divergence(bandpo.Divergence(name, OWN[name]) if name in OWN else name)


@pytest.mark.parametrize(("own", "name"), [("plain reverse_kl", "reverse_kl"), ("plain kl", "kl"), ("twice tv", "tv")])
def test_an_f_that_is_not_normalised_gives_the_same_bounds(own, name):
    log_p = torch.linspace(-6, -0.05, 40, dtype=torch.float64)
    scale = 2 if own == "twice tv" else 1
    ours = bandpo.band(log_p, scale * 0.05, bandpo.Divergence(own, OWN[own]))
    theirs = bandpo.band(log_p, 0.05, name)
    torch.testing.assert_close(ours.low, theirs.low, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.log_high, theirs.log_high, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["tv", "chi2", "neyman", "hellinger", "js"])
def test_a_shape_that_is_written_down_is_the_one_that_would_be_read(name):
    written, read = FAMILY[name].shape, read_shape(name, FAMILY[name].f)
    assert read[:-2] == pytest.approx(written[:-2], rel=1e-3, abs=1e-9)
    assert read.smooth == written.smooth


def swap(divergence, **fields):
    return lambda: dataclasses.replace(divergence, **fields)


BROKEN = {
    "concave": (lambda: bandpo.Divergence("x", lambda u: -((u - 1) ** 2)), "f is not convex at u = "),
    "f(1)": (lambda: bandpo.Divergence("x", lambda u: u * u), "f(1) = 1: must be 0"),
    "nan": (lambda: bandpo.Divergence("x", lambda u: torch.log(u - 0.5) ** 2), "is nan: must be finite"),
    "not elementwise": (lambda: bandpo.Divergence("x", lambda u: u.sum() - 1), "must be elementwise"),
    "straight": (lambda: bandpo.Divergence("x", lambda u: u - 1), "f is a straight line"),
    "bounds of another": (swap(CHI2, bounds=KL.bounds), "bounds are not the least ratio with g_f <= delta"),
    "bounds off by a hair": (
        swap(CHI2, bounds=lambda p, low, high: tuple(x * 1.0001 for x in CHI2.bounds(p, low, high))),
        "correct bounds, or leave it out",
    ),
    "upper bound only": (
        swap(CHI2, bounds=lambda p, low, high: (CHI2.bounds(p, low, high)[0], 0.99 * CHI2.bounds(p, low, high)[1])),
        "bounds are not the greatest ratio with g_f <= delta",
    ),
    "nan bounds": (swap(CHI2, bounds=lambda p, low, high: (p * math.nan, p * math.nan)), "bounds are not finite"),
    "series": (swap(JS, series=(0.26, *JS.series[1:])), "series is not f less its tangent at u = 0.9"),
    "perspective": (swap(JS, perspective=lambda o: o.moved**4 / o.p**3), "perspective is not p f(q / p) at u = "),
    "not homogeneous": (
        swap(CHI2, perspective=lambda o: (o.q / o.p - 1) ** 2),
        "perspective is not p f(q / p) at u = ",
    ),
    "shape": (swap(JS, shape=KL.shape), "shape.at_zero=inf, but f(0) is 0.693"),
    "f behind a shape": (swap(KL, f=lambda u: torch.log(u)), "f is not convex"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_each_way_to_break_a_divergence_is_named(how):
    make, words = BROKEN[how]
    with pytest.raises(bandpo.InputError) as caught:
        check_divergence(make())
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("divergence", [*FAMILY, *ALPHAS])
def test_a_band_of_every_divergence_keeps_the_contract_of_clips(divergence):
    check_clip(bandpo.Band(divergence, delta=(0.01, 0.1), cap=None))


class Wrong(bandpo.Fixed):
    """A fixed clip with one thing wrong."""

    def __init__(self, how):
        super().__init__()
        object.__setattr__(self, "how", how)

    def bounds(self, old_logps):
        right = super().bounds(old_logps)
        if self.how == "float64":
            return bandpo.Bounds(right.log_low.double(), right.log_high.double())
        if self.how == "infinite":
            return bandpo.Bounds(right.log_low, right.log_high / (old_logps < -1))
        if self.how == "above 1":
            return bandpo.Bounds(-right.log_low, right.log_high)
        return (right.log_low, right.log_high) if self.how == "tuple" else right

    def side(self, tokens):
        right = super().side(tokens)
        return torch.where(tokens.log_r > 0.5, 0.0, right) if self.how == "side" else right

    def coefficient(self, tokens):
        c = super().coefficient(tokens)
        if self.how == "overflow":
            return c / tokens.p
        if self.how == "half":
            return c.half()
        if self.how == "padding":
            return c + (0 if tokens.mask is None else (~tokens.mask).to(c.dtype))
        if self.how == "in place":
            return tokens.ratio.mul_(tokens.advantages) if tokens.mask is None else tokens.advantages.mul_(2.0)
        return c

    def advantages(self, tokens):
        return super().advantages(tokens) * (1.1 if self.how == "advantages" else 1.0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("float64", "log_low of torch.float32 tokens is torch.float64"),
        ("infinite", "must be finite log-ratios, but not at p = "),
        ("above 1", "must have low <= 1 <= high"),
        ("tuple", "returns tuple: must return bandpo.Bounds"),
        ("side", "side disagrees with its bounds at p = "),
        ("overflow", "coefficient is nan at log p = "),
        ("half", "coefficient of torch.float32 tokens is torch.float16"),
        ("padding", "coefficient depends on what stands in padding"),
        ("in place", "coefficient"),
        ("advantages", "advantages times r is not the coefficient at p = "),
    ],
)
def test_each_way_to_break_a_clip_is_named(how, words):
    check_clip(Wrong("nothing"))
    with pytest.raises(bandpo.InputError) as caught:
        check_clip(Wrong(how))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_clip_that_promises_the_simplex_must_keep_to_it():
    with pytest.raises(bandpo.InputError, match="must have high \\* p <= 1"):
        check_clip(bandpo.Fixed(), simplex=True)
    with pytest.raises(bandpo.InputError, match="did you mean 'band'"):
        check_clip("bnd")


def test_a_divergence_costs_one_line():
    """What goes where a name goes, with nothing but f."""
    mine = bandpo.Divergence("lecam", lambda u: (u - 1) ** 2 / (u + 1))
    old = torch.linspace(-5, -0.1, 60, dtype=torch.float64)[None]
    logps = torch.minimum(old + 0.5 * torch.sin(9 * old), old / 50).requires_grad_()
    bounds = bandpo.band(old, 0.05, mine)
    p, q = old.exp(), logps.detach().exp()
    # (q-p)^2 (1/(p+q) + 1/(2-p-q)) = delta: of second degree in s = p + q, with (s - 2p)^2 * 2 = delta s (2 - s)
    a, b, c = 2 + 0.05, -8 * p - 2 * 0.05, 8 * p**2
    root = (b**2 - 4 * a * c).sqrt()
    torch.testing.assert_close(bounds.high, (-b + root) / (2 * a) / p - 1, rtol=1e-9, atol=0)
    torch.testing.assert_close(bounds.low, ((-b - root) / (2 * a) / p - 1).clamp(min=0), rtol=1e-7, atol=1e-12)
    g = (q - p) ** 2 * (1 / (p + q) + 1 / (2 - p - q))
    torch.testing.assert_close(bandpo.binary_divergence(logps.detach(), old, mine), g, rtol=1e-9, atol=1e-15)
    assert torch.equal(bandpo.in_band(logps.detach(), old, 0.05, mine), g <= 0.05)
    assert bandpo.certify(bounds, old, 0.05, mine, rtol=1e-9).all()
    clip = bandpo.Band(mine, delta=0.05, cap=None)
    out = bandpo.policy_loss(logps, old, torch.ones(1), clip=clip, aggregation="sum")
    out.loss.backward()
    assert torch.equal(logps.grad == 0, (g > 0.05) & (q > p)) and 0 < (logps.grad == 0).sum() < 60
    assert out.metrics["outside_above"] > 0
    check_clip(clip)
    check_divergence(mine)
