"""Whole-distribution divergences against their sums in float64, the order of the three, and the memory they take."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from truth.bounds import NAMES

import bandpo
from bandpo.analysis import audit as whole
from bandpo.loss.stats import BUCKETS, EDGES

SUMS = {  # over the distributions themselves, not through f
    "kl": lambda p, q: p * (p / q).log(),
    "tv": lambda p, q: (q - p).abs() / 2,
    "chi2": lambda p, q: (q - p) ** 2 / p,
    "reverse_kl": lambda p, q: q * (q / p).log(),
    "neyman": lambda p, q: (q - p) ** 2 / q,
    "hellinger": lambda p, q: (q.sqrt() - p.sqrt()) ** 2,
    "js": lambda p, q: p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log(),
    **{
        name: lambda p, q, a=float(name[6:]): p * ((q / p) ** a - 1) / (a * (a - 1))
        for name in NAMES
        if name.startswith("alpha:")
    },
}


def batch(dtype=torch.float32, move=0.5, vocabulary=300):
    generator = torch.Generator().manual_seed(3)
    old = 3 * torch.randn(4, 24, vocabulary, generator=generator)
    new = old + move * torch.randn(old.shape, generator=generator)
    old, new = old.to(dtype), new.to(dtype)
    p = old.double().softmax(-1)
    actions = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(4, 24)
    return new, old, actions, torch.arange(24) < torch.tensor([24, 20, 3, 9])[:, None]


def taken(logits, actions):
    return torch.log_softmax(logits.double(), -1).gather(-1, actions[..., None])[..., 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_sum_over_the_vocabulary(name, dtype, monkeypatch):
    new, old, _, _ = batch(dtype)
    p, q = old.double().softmax(-1), new.double().softmax(-1)
    want = SUMS[name](p, q).sum(-1)
    got = bandpo.whole_divergence(new, old, name)
    assert got.dtype == (dtype if dtype == torch.float64 else torch.float32) and got.shape == (4, 24)
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)
    monkeypatch.setattr(whole, "PIECE", 7 * 300)
    assert torch.equal(bandpo.whole_divergence(new, old, name), got)
    shifted = torch.stack([new, new])[:, :, 1:]  # not contiguous
    again = bandpo.whole_divergence(shifted, torch.stack([old, old])[:, :, 1:], name)
    torch.testing.assert_close(again[1], got[:, 1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_small_moves_keep_their_digits(name):
    """To second order every divergence is f''(1) / 2 times the variance of the change of the logits."""
    new, old, _, _ = batch(torch.float64)
    new = old + 1e-5 * (new - old)
    p = old.softmax(-1)
    change = (new - old) - (p * (new - old)).sum(-1, keepdim=True)
    size = {"tv": (p * change.abs()).sum(-1) / 2}.get(name, (p * change**2).sum(-1) / 2)
    curvature = {"chi2": 2, "neyman": 2, "hellinger": 0.5, "js": 0.5}.get(name, 1)
    torch.testing.assert_close(bandpo.whole_divergence(new, old, name), curvature * size, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_binary_is_at_most_top_k_is_at_most_whole(name):
    new, old, actions, _ = batch(torch.float64)
    full = bandpo.whole_divergence(new, old, name)
    binary = bandpo.binary_divergence(taken(new, actions), taken(old, actions), name)
    steps = [binary] + [bandpo.top_k_divergence(new, old, k, actions, name) for k in (1, 5, 50, 299)] + [full]
    for smaller, larger in zip(steps, steps[1:], strict=False):
        assert (smaller <= larger * (1 + 1e-9)).all()
    assert (binary < 0.9 * steps[2]).any() and (steps[2] < 0.9 * full).any()
    torch.testing.assert_close(bandpo.top_k_divergence(new, old, 300, actions, name), full, rtol=1e-10, atol=0)
    p, q = old.softmax(-1), new.softmax(-1)
    top = p.topk(5, -1).indices
    merged = []
    for x in (p, q):  # the five likeliest and the rest, written out
        mine = x.gather(-1, top)
        merged.append(torch.cat([mine, 1 - mine.sum(-1, keepdim=True)], -1))
    want = SUMS[name](*merged).sum(-1)
    torch.testing.assert_close(bandpo.top_k_divergence(new, old, 5, divergence=name), want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_actions_at_minus_infinity(name):
    """0 f(0/0) = 0 where both policies forbid an action; where one does, the exact term, or a large one for inf."""
    new, old, _, _ = batch(torch.float64, vocabulary=20)
    short = bandpo.whole_divergence(new, old, name)
    wall = torch.full((4, 24, 3), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(bandpo.whole_divergence(*(torch.cat([x, wall], -1) for x in (new, old)), name), short)
    p, q = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64), torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64)
    got = bandpo.whole_divergence(q.log()[None], p.log()[None], name).item()
    finite = {"tv": 0.6, "hellinger": 1.2, "js": 1.2 * math.log(2), "alpha:0.3": 0.6 / 0.21}
    assert got == pytest.approx(finite[name], rel=1e-9) if name in finite else got > 100
    p, q = torch.tensor([[0.4, 0.6]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    got = bandpo.whole_divergence(q.log(), p.log(), name).item()
    finite = {"tv": 0.6, "chi2": 1.5, "reverse_kl": -math.log(0.4), "hellinger": 2 - 2 * math.sqrt(0.4)}
    finite |= {"alpha:0.3": (0.4**0.7 - 1) / -0.21, "alpha:3": (0.4**-2 - 1) / 6}
    finite |= {"js": 0.4 * math.log(0.8 / 1.4) + math.log(2 / 1.4) + 0.6 * math.log(2)}
    assert got == pytest.approx(finite[name], rel=1e-9) if name in finite else got > 100


@pytest.mark.parametrize("name", ["kl", "tv", "js"])
@pytest.mark.parametrize("delta", [0.02, (0.01, 0.05)])
def test_the_audit_counts_what_the_band_missed(name, delta):
    new, old, actions, mask = batch()
    got = bandpo.audit(new, old, actions, mask, delta=delta, divergence=name).metrics()
    lq, lp = taken(new, actions), taken(old, actions)
    inside = bandpo.in_band(lq, lp, delta, name)
    full = bandpo.whole_divergence(new, old, name).double()
    binary = bandpo.binary_divergence(lq, lp, name)
    low, high = delta if isinstance(delta, tuple) else (delta, delta)
    beyond = full > torch.where(lq < lp, low, high)
    bucket = torch.bucketize(lp.exp(), torch.tensor(EDGES, dtype=torch.float64))
    assert (inside & beyond & mask).any() and (~inside & mask).any()
    for i, place in [(None, "")] + [(i, f"/{b}") for i, b in enumerate(BUCKETS)]:
        here = mask if i is None else mask & (bucket == i)
        n = max(here.sum().item(), 1)
        assert got[f"tokens{place}"] == here.sum()
        for key, hit in (("outside", ~inside), ("beyond", beyond), ("missed", beyond & inside)):
            assert got[key + place].item() == pytest.approx((hit & here).sum().item() / n)
        assert got[f"whole_mean{place}"].item() == pytest.approx(full[here].sum().item() / n, rel=1e-6)
        assert got[f"binary_mean{place}"].item() == pytest.approx(binary[here].sum().item() / n, rel=1e-6)
        if here.any():
            assert got[f"ratio{place}"].item() == pytest.approx((binary[here].sum() / full[here].sum()).item(), 1e-6)
    halves = [bandpo.audit(new[s], old[s], actions[s], mask[s], delta=delta, divergence=name) for s in ([0, 1], [2, 3])]
    for key, value in (halves[0] + halves[1]).metrics("x/").items():
        torch.testing.assert_close(value, got[key[2:]])
    for junk, index in ((math.nan, -100), (-math.inf, 10**9)):
        dirty = [torch.where(mask[..., None], x, junk) for x in (new, old)]
        again = bandpo.audit(*dirty, actions.where(mask, index), mask, delta=delta, divergence=name).metrics()
        assert all(torch.equal(again[key], got[key]) for key in got)


def peak(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("contiguous", [True, False])
def test_memory_stays_far_below_a_copy_of_the_logits(contiguous, monkeypatch):
    monkeypatch.setattr(whole, "PIECE", 1 << 16)
    new, old = (torch.randn(4, 33, 32000).to(torch.bfloat16) for _ in range(2))
    new, old = (x[:, :32].contiguous() if contiguous else x[:, 1:] for x in (new, old))
    actions = torch.zeros(4, 32, dtype=torch.int64)
    copy = 4 * new.numel()
    for call in (
        lambda: bandpo.whole_divergence(new, old),
        lambda: bandpo.audit(new, old, actions, delta=0.05),
        lambda: bandpo.top_k_divergence(new, old, 20, actions),
    ):
        used = peak(call)
        assert 4 * whole.PIECE < used < copy / 3, used / copy


def test_nothing_waits_for_the_device():
    """A fake tensor has no values: whatever asks for one raises."""
    with FakeTensorMode():
        new, old, actions, mask = torch.zeros(4, 6, 9), torch.zeros(4, 6, 9), *torch.zeros(2, 4, 6).long()
        audit = bandpo.audit(new, old, actions, mask, delta=torch.full((4, 6), 0.05), divergence="js")
        assert audit.sums.shape == (len(BUCKETS), len(whole.FIELDS)) and len(audit.metrics()) == 42
        assert bandpo.whole_divergence(new, old).shape == bandpo.top_k_divergence(new, old, 2, actions).shape == (4, 6)
        logps = new.log_softmax(-1)[..., 0]
        assert bandpo.certify(bandpo.Fixed().bounds(logps), logps, 0.05).all().shape == ()


X, A = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bandpo.whole_divergence(X, X[:1]), "old_logits (1, 3, 5)"),
        (lambda: bandpo.whole_divergence(A, A), "logits is a torch.int64 tensor"),
        (lambda: bandpo.whole_divergence(X, X, "kll"), "did you mean 'kl'"),
        (lambda: bandpo.top_k_divergence(X, X, 6), "k=6"),
        (lambda: bandpo.top_k_divergence(X, X, 2.0), "k=2.0"),
        (lambda: bandpo.top_k_divergence(X, X, 2, A[:1]), "actions is torch.int64 of shape (1, 3)"),
        (lambda: bandpo.audit(X, X, A.int(), delta=0.1), "actions is torch.int32"),
        (lambda: bandpo.audit(X, X, A, A[:1], delta=0.1), "mask has shape (1, 3)"),
        (lambda: bandpo.audit(X, X, A, delta=0), "delta=0"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(bandpo.InputError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
