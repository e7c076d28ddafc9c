"""What holds for every adapter: the engine's own loss under the fixed clip, the written rule under the band."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import CASES, NEVER, Case, Tokens

Tensor = torch.Tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the engines, at import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def tokens(seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5, 4, generator=generator) * 2
    actions = torch.randint(0, 4, (6, 5), generator=generator)
    old = (logits + torch.randn(6, 5, 4, generator=generator) * 1.2).log_softmax(-1)
    old = old.gather(-1, actions[..., None])[..., 0]
    advantages = torch.randn(6, 5, generator=generator)
    mask = (torch.arange(5) >= torch.tensor([0, 0, 1, 2, 0, 3])[:, None]).float()  # left padding suits all engines
    return Tokens(logits.requires_grad_(), actions, old, advantages, mask)


def gradient(x: Tokens, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x.logits, retain_graph=True)[0]


def tv_interval(p: Tensor) -> tuple[Tensor, Tensor]:
    return (1 - 0.05 / p).clamp(min=0), torch.minimum(1 + 0.05 / p, 1 / p).clamp(max=10)


def kl_interval(p: Tensor) -> tuple[Tensor, Tensor]:
    """Bisection on KL(p, q) = 0.05 in float64, both sides."""
    edges = []
    for end in (torch.zeros_like(p), torch.ones_like(p)):
        inside, outside = p.clone(), end
        for _ in range(100):
            q = (inside + outside) / 2
            over = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() > 0.05
            inside, outside = torch.where(over, inside, q), torch.where(over, q, outside)
        edges.append(inside / p)
    return edges[0], edges[1].clamp(max=10)


INTERVALS = {"tv": tv_interval, "kl": kl_interval}


def gate(x: Tokens, divergence: str) -> Tensor:
    """1 where the written rule leaves the gradient: not outside with an advantage that pushes further out."""
    low, high = INTERVALS[divergence](x.old.double().exp())
    ratio = (x.new() - x.old).exp()
    return 1 - (((x.advantages > 0) & (ratio > high)) | ((x.advantages < 0) & (ratio < low))).float()


def unpadded(case: Case, x: Tokens) -> Tokens:
    """The same tokens, without padding where the engine has no mask."""
    return x if case.padded else dataclasses.replace(x, mask=torch.ones_like(x.mask))


def test_the_fixed_clip_is_the_engines_own(case: Case) -> None:
    x, (low, high) = unpadded(case, tokens()), case.margins
    got, _ = case.ours(x, "fixed", {"eps_low": low, "eps_high": high})
    want = case.own(x, low, high)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(x, got), gradient(x, want), rtol=1e-5, atol=1e-6)
    free = gradient(x, case.own(x, *NEVER))
    assert (gradient(x, want) - free).abs().max() > 1e-3, "the clip never acted"


@pytest.mark.parametrize("divergence", INTERVALS)
def test_the_band_takes_the_gradient_that_the_rule_says(case: Case, divergence: str) -> None:
    x = unpadded(case, tokens(1))
    keep = gate(x, divergence)
    assert 0.1 < 1 - keep[x.mask.bool()].mean() < 0.9
    got, metrics = case.ours(x, "band", {"divergence": divergence, "delta": 0.05})
    # an engine's loss is a sum over tokens: a token whose advantage is 0 has no gradient
    reference = dataclasses.replace(x, advantages=x.advantages * keep)
    want = gradient(x, case.own(reference, *NEVER))
    torch.testing.assert_close(gradient(x, got), want, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got).all()
    check_metrics(metrics, x, keep)


def check_metrics(metrics: dict[str, Any], x: Tokens, keep: Tensor) -> None:
    if "pg_clipfrac" in metrics:  # slime has no place for metrics of a loss
        assert float(metrics["pg_clipfrac"]) == float((1 - keep)[x.mask.bool()].sum())
        return
    (share,) = (float(v) for k, v in metrics.items() if k in ("clip/zero_grad", "clip_zero_grad"))
    if share != pytest.approx(float((1 - keep[0])[x.mask[0].bool()].mean())):  # prime-rl's are of one sequence
        assert share == pytest.approx(float((1 - keep)[x.mask.bool()].mean()))


def test_padding_is_inert_whatever_it_holds(case: Case) -> None:
    if not case.padded:
        pytest.skip("the engine has no padding here: every action or token counts")
    x, args = tokens(2), {"divergence": "kl", "delta": 0.05}
    want, _ = case.ours(x, "band", args)
    pad = x.mask == 0
    old, advantages = (torch.where(pad, torch.nan, y) for y in (x.old, x.advantages))
    dirty = dataclasses.replace(x, old=old, advantages=advantages)
    if case.takes_logps:
        dirty.new = lambda: torch.where(pad, torch.nan, x.new())  # type: ignore[method-assign]
    got, metrics = case.ours(dirty, "band", args)
    assert torch.equal(got, want) and torch.equal(gradient(x, got), gradient(x, want))
    assert gradient(x, got)[pad].abs().max() == 0
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in metrics.values())


@pytest.mark.parametrize("bad", [("bandd", None), ("band", {"detla": 1}), ("band", 0.05), (3, None)])
def test_a_bad_clip_is_one_clear_line(case: Case, bad: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="clip") as error:
        case.ours(unpadded(case, tokens()), *bad)
    assert "\n" not in str(error.value)
