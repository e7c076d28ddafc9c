"""policy_loss against the written gradient coefficient, plain PPO, and NaN in the padding."""

import math
import shutil

import pytest
import torch

import bandpo
from bandpo.loss.stats import BUCKETS, EDGES
from bandpo.operator.tokens import Tokens

CLIPS = {
    "kl": bandpo.Band(delta=0.05, cap=10.0),
    "kl pair": bandpo.Band(delta=(0.01, 0.1), cap=None),
    "tv": bandpo.Band("tv", delta=0.05, cap=3.0),
    "chi2": bandpo.Band("chi2", delta=0.05, cap=None),
    "mine": bandpo.Band(bandpo.Divergence("mine", lambda u: u * torch.log(u) - u + 1), delta=0.05, cap=None),
    "fixed": bandpo.Fixed(0.2, 0.28),
    "none": bandpo.NoClip(),
    "sides": bandpo.Sides(high=bandpo.Band(delta=0.05), low=bandpo.Fixed(eps_low=0.2)),
}


def tokens(rows=64, columns=96, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    old = torch.log_softmax(3 * torch.randn(rows, columns, 6, generator=generator, dtype=dtype), -1)[..., 0]
    logps = (old + 0.5 * torch.randn(rows, columns, generator=generator, dtype=dtype)).clamp(max=-1e-4)
    advantages = torch.randn(rows, columns, generator=generator, dtype=dtype)
    lengths = torch.randint(1, columns, (rows, 1), generator=generator)
    return logps, old, advantages, torch.arange(columns) < lengths


def coefficient(clip, logps, old, advantages, dual_clip):
    """c(p, r, A) as the paper writes it, from the solved bounds: r A, or 0 where the min takes the clipped branch."""
    bounds, log_ratio = clip.bounds(old), logps - old
    shut = ((advantages > 0) & (log_ratio > bounds.log_high)) | ((advantages < 0) & (log_ratio < bounds.log_low))
    if dual_clip is not None:
        shut |= (advantages < 0) & (log_ratio > math.log(dual_clip))
    return torch.where(shut, 0.0, torch.exp(log_ratio) * advantages)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("name", CLIPS)
def test_gradient_is_the_written_coefficient(name, dual_clip):
    logps, old, advantages, mask = tokens()
    want = coefficient(CLIPS[name], logps, old, advantages, dual_clip) * mask
    assert name == "none" or 0.02 < ((want == 0) & mask).sum() / mask.sum() < 0.6
    x = logps.clone().requires_grad_()
    out = bandpo.policy_loss(x, old, advantages, mask, clip=CLIPS[name], dual_clip=dual_clip, aggregation="sum")
    out.loss.backward()
    torch.testing.assert_close(x.grad, -want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("name", CLIPS)
def test_exact_value_is_the_objective_and_its_autograd(name, dual_clip):
    logps, old, advantages, mask = tokens()
    x, y = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    out = bandpo.policy_loss(
        x, old, advantages, mask, clip=CLIPS[name], dual_clip=dual_clip, aggregation="none", exact_value=True
    )
    bounds, ratio = CLIPS[name].bounds(old), torch.exp(y - old)
    objective = torch.minimum(ratio * advantages, ratio.clamp(bounds.low, bounds.high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    torch.testing.assert_close(out.loss[mask], -objective[mask], rtol=1e-9, atol=1e-12)
    assert (out.loss[~mask] == 0).all()
    out.loss.sum().backward()
    (-objective * mask).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    surrogate = bandpo.policy_loss(logps, old, advantages, mask, clip=CLIPS[name], aggregation="none").loss
    torch.testing.assert_close(surrogate, -torch.exp(logps - old) * advantages * mask)


def test_aggregations():
    logps, old, advantages, mask = tokens(8, 12)
    mask[3] = False
    per_token = bandpo.policy_loss(logps, old, advantages, mask, aggregation="none").loss
    rows = per_token.sum(1)
    lengths, present = mask.sum(1), mask.any(1)

    def loss(aggregation, **kwargs):
        return bandpo.policy_loss(logps, old, advantages, mask, aggregation=aggregation, **kwargs).loss

    torch.testing.assert_close(loss("token-mean"), per_token.sum() / mask.sum())
    torch.testing.assert_close(loss("token-mean", normalizer=100.0), per_token.sum() / 100)
    torch.testing.assert_close(loss("sum"), per_token.sum())
    torch.testing.assert_close(loss("seq-mean-token-sum"), rows.sum() / 7)
    torch.testing.assert_close(loss("seq-mean-token-sum", normalizer=8 * 12.0), rows.sum() / 96)
    torch.testing.assert_close(loss("seq-mean-token-mean"), (rows / lengths.clamp(min=1))[present].mean())
    torch.testing.assert_close(loss(lambda x, m: (x * m).sum() / 3), per_token.sum() / 3)
    nothing = bandpo.policy_loss(logps, old, advantages, torch.zeros_like(mask))
    assert nothing.loss == 0 and all(torch.isfinite(v) for v in nothing.metrics.values())


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_padding_is_inert_whatever_it_holds(aggregation):
    logps, old, advantages, mask = tokens(dtype=torch.float32)
    clean = logps.clone().requires_grad_()
    want = bandpo.policy_loss(clean, old, advantages, mask, aggregation=aggregation)
    want.loss.backward()
    for junk in (math.nan, math.inf, -math.inf, 3.0):
        x, dirty_old, dirty_adv = (torch.where(mask, t, junk) for t in (logps, old, advantages))
        x.requires_grad_()
        out = bandpo.policy_loss(x, dirty_old, dirty_adv, mask, aggregation=aggregation)
        out.loss.backward()
        assert torch.equal(out.loss, want.loss) and torch.equal(x.grad, clean.grad)
        assert all(torch.equal(out.metrics[k], want.metrics[k]) for k in want.metrics)
    broken = logps.clone()
    broken[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = math.nan
    assert torch.isnan(bandpo.policy_loss(broken, old, advantages, mask).loss)  # a NaN in a token is never hidden


def test_extreme_tokens_stay_finite():
    old = torch.tensor([-math.inf, -1e4, -80.0, -1e-7, 0.0, -1.0, -100.0, -math.inf])
    logps = torch.tensor([-1.0, -5.0, -200.0, 0.0, -50.0, -math.inf, -0.5, -math.inf])
    for sign in (-1.0, 1.0):
        for clip in CLIPS.values():
            x = logps.clone().requires_grad_()
            loss = bandpo.policy_loss(x, old, torch.full((8,), sign), clip=clip, aggregation="none").loss
            loss.sum().backward()
            assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(64,), (64, 1)])
def test_advantages_per_sequence(shape):
    logps, old, advantages, mask = tokens()
    each = advantages[:, 0]
    want = bandpo.policy_loss(logps, old, each[:, None].expand_as(logps), mask).loss
    assert torch.equal(bandpo.policy_loss(logps, old, each.reshape(shape), mask).loss, want)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(kind):
    logps, old, advantages, mask = (t.to(kind) if t.is_floating_point() else t for t in tokens())
    x = logps.clone().requires_grad_()
    out = bandpo.policy_loss(x, old, advantages, mask, aggregation="none")
    out.loss.sum().backward()
    y = logps.float().requires_grad_()
    want = bandpo.policy_loss(y, old.float(), advantages.float(), mask, aggregation="none")
    want.loss.sum().backward()
    assert out.loss.dtype == torch.float32 and x.grad.dtype == kind
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(x.grad, y.grad.to(kind))


@pytest.mark.parametrize("name", CLIPS)
def test_metrics_are_counts_by_bucket(name):
    clip = CLIPS[name]
    logps, old, advantages, mask = tokens()
    metrics = bandpo.policy_loss(logps, old, advantages, mask, clip=clip).metrics
    far = bandpo.policy_loss(logps, old, advantages, mask, clip=clip, dual_clip=1e9).metrics
    assert all(
        torch.equal(far[key], value) for key, value in metrics.items()
    )  # a dual clip out of reach changes nothing
    bounds, by_divergence, log_ratio = clip.bounds(old), clip.uncapped().bounds(old), logps - old
    above, below = log_ratio > bounds.log_high, log_ratio < bounds.log_low
    past_cap = above & (log_ratio <= by_divergence.log_high)
    assert (past_cap.sum() > 0) == (name == "tv")
    g = bandpo.binary_divergence(logps, old, clip.measure)
    bucket = torch.bucketize(old.exp(), torch.tensor(EDGES, dtype=torch.float64))
    for i, suffix in [(None, "")] + [(i, f"/{b}") for i, b in enumerate(BUCKETS)]:
        here = mask if i is None else mask & (bucket == i)
        n = here.sum()
        assert n > 20
        want = {
            "outside_above": (above & ~past_cap & here).sum() / n,
            "capped": (past_cap & here).sum() / n,
            "outside_below": (below & here).sum() / n,
            "zero_grad_above": (above & (advantages > 0) & here).sum() / n,
            "zero_grad_below": (below & (advantages < 0) & here).sum() / n,
            "divergence_mean": g[here].mean(),
            "divergence_max": g[here].max(),
        }
        for key, value in want.items():
            torch.testing.assert_close(metrics[key + suffix].double(), value.double(), rtol=1e-6, atol=1e-9)
        if i is not None:
            torch.testing.assert_close(metrics["share" + suffix].double(), (n / mask.sum()).double(), rtol=1e-6, atol=0)
    first, second = (
        bandpo.clip_stats(logps[s], old[s], advantages[s], mask[s], clip=clip) for s in (slice(20), slice(20, None))
    )
    joined = (first + second).metrics("x/")
    for key, value in metrics.items():
        torch.testing.assert_close(joined["x/" + key], value)


def test_no_metrics_no_work():
    logps, old, advantages, mask = tokens(4, 5)
    assert bandpo.policy_loss(logps, old, advantages, mask, metrics=False).metrics == {}


@pytest.mark.parametrize("name", ["band", "fixed", "sapo", "kl_cov", "clip_cov"])
def test_one_token_may_have_no_dimension(name):
    logps, old, advantages = torch.tensor([-0.9, -1.4, 1.5])
    out = bandpo.policy_loss(logps, old, advantages, clip=name)
    want = bandpo.policy_loss(logps[None], old[None], advantages[None], clip=name)
    torch.testing.assert_close([out.loss, out.metrics], [want.loss, want.metrics], equal_nan=True)
    tokens_seen = Tokens(logps, old, advantages)
    assert bandpo.get_clip(name).coefficient(tokens_seen).shape == ()


def test_half_types_round_neither_counts_nor_edges():
    ones = torch.ones(1, 3000)
    old = torch.full_like(ones, -2.296875)  # p = .10057, which a bfloat16 log(.1) would put below .1
    out = bandpo.policy_loss(old.bfloat16(), old.bfloat16(), ones, ones.bfloat16())
    assert out.metrics["share/p0.1-0.5"] == 1
    torch.testing.assert_close(out.loss, torch.tensor(-1.0))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, three of them
@pytest.mark.parametrize("name", ["kl", "tv", "chi2"])
def test_compiles_whole_and_agrees(name):
    torch._dynamo.reset()
    logps, old, advantages, mask = tokens(16, 32, dtype=torch.float32)
    old[0], logps[0] = -1e-6, -1.5e-6  # where 1 - p has no digit left for a careless expm1
    clip = bandpo.Band(name)

    def run(x):
        return bandpo.policy_loss(x, old, advantages, mask.float(), clip=clip).loss, clip.bounds(old).log_low

    x, y = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    loss, log_low = torch.compile(run, fullgraph=True)(x)
    want, want_low = run(y)
    loss.backward(), want.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(log_low, want_low, rtol=1e-5, atol=0)
