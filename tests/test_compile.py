"""torch.compile takes the core whole, and nothing in it waits for the device."""

import math
import shutil

import pytest
import torch

import bandpo
from bandpo.operator.tokens import expm1

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, several of them
NAMES = ["kl", "tv", "chi2", "reverse_kl", "neyman", "hellinger", "js", "alpha:-1.5", "alpha:3"]
MINE = bandpo.Divergence("lecam", lambda u: (u - 1) ** 2 / (u + 1))


def batch(rows, columns, device="cpu"):
    torch.manual_seed(rows)
    old = -torch.rand(rows, columns) * 6
    logps = (old + 0.4 * torch.randn(rows, columns)).clamp(max=-1e-4)
    tensors = logps, old, torch.randn(rows, columns), (torch.rand(rows, columns) > 0.2).float()
    return [x.to(device) for x in tensors]


def step(name, logps, old, advantages, mask):
    """What a training step calls; returns tensors only."""
    clip = bandpo.Band(divergence=name, delta=(0.05, 0.1))
    out = bandpo.policy_loss(logps, old, advantages, mask, clip=clip, dual_clip=5.0, aggregation="seq-mean-token-mean")
    inside = bandpo.in_band(logps, old, 0.05, name)
    return [out.loss, *out.metrics.values(), *bandpo.band_eps(old, torch.full_like(old, 0.05), name), inside]


def rest(name, logps, old, advantages, mask):
    clip = bandpo.Band(divergence=name)
    exact = bandpo.policy_loss(logps, old, advantages, mask, clip=clip, exact_value=True, metrics=False)
    bounds = bandpo.band(old, 0.05, name)
    radii = bandpo.implied_delta(bounds.log_low, bounds.log_high, old, name)
    return [exact.loss, bounds.low, bounds.high, *radii, bandpo.clip_stats(logps, old, advantages, mask).sums]


@pytest.mark.parametrize("name", ["kl", "tv", "js"])
def test_one_graph_for_every_shape(name):
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    for i, shape in enumerate(((3, 5), (4, 7), (6, 8))):
        arguments = batch(*shape)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(name, *arguments)
        for x, y in zip(got, step(name, *arguments), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-6)


def test_the_expm1_that_compilers_get_has_the_digits():
    """The same formula, run operation by operation, against float64; Inductor's own has none near 0."""
    small = torch.logspace(-30, 0, 3000)
    x = torch.cat([-small, small, torch.linspace(-87, 80, 20_001), torch.tensor([0.0, -1000.0, -3e38])])
    compiled = torch.compile(expm1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x.double().expm1().float(), rtol=4e-7, atol=0)
    assert compiled(torch.tensor([math.nan])).isnan()


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["js", MINE], ids=str)
def test_inductor_solves_as_well_as_eager(name):
    torch._dynamo.reset()
    old = batch(40, 50)[1]
    bounds = torch.compile(lambda x: bandpo.band(x, 0.05, name), fullgraph=True)(old)
    eager = bandpo.band(old, 0.05, name)
    torch.testing.assert_close(bounds.log_low, eager.log_low, rtol=5e-6, atol=0)
    torch.testing.assert_close(bounds.log_high, eager.log_high, rtol=5e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (200, 100)], ids=["few", "many"])
@pytest.mark.parametrize("name", [*NAMES, MINE], ids=str)
def test_nothing_asks_for_a_value(name, shape):
    """On the meta device there are no values: `.item()`, `if tensor` and shapes that depend on data all raise."""
    arguments = batch(*shape, "meta")
    arguments[0].requires_grad_()
    loss, *others = step(name, *arguments) + rest(name, *arguments)
    loss.backward()
    assert arguments[0].grad.is_meta and all(x.is_meta for x in others)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()  # the check can fail
