"""What holds for every adapter: the engine's own loss under the fixed clip, the clip's own c under any clip."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, NEVER, Case, Tokens, tokens
from matrix import REFUSED, as_markdown, attempt, coefficient, matrix, short

import bandpo
from bandpo.loss.stats import BRIEF

Tensor = torch.Tensor
DOCS = Path(__file__).parents[2] / "docs"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the engines, at import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def tv_interval(p: Tensor) -> tuple[Tensor, Tensor]:
    return (1 - 0.05 / p).clamp(min=0), torch.minimum(1 + 0.05 / p, 1 / p)


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
    return edges[0], edges[1]


INTERVALS = {"tv": tv_interval, "kl": kl_interval}


def gate(x: Tokens, divergence: str) -> Tensor:
    """1 where the written rule leaves the gradient: not outside with an advantage that pushes further out."""
    low, high = INTERVALS[divergence](x.old.double().exp())
    ratio = (x.new() - x.old).exp()
    return 1 - (((x.advantages > 0) & (ratio > high)) | ((x.advantages < 0) & (ratio < low))).float()


def test_the_fixed_clip_is_the_engines_own(case: Case) -> None:
    x, (low, high) = case.fit(tokens()), case.margins
    got, _ = case.ours(x, "fixed", {"eps_low": low, "eps_high": high})
    want = case.own(x, low, high)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.gradient(got), x.gradient(want), rtol=1e-5, atol=1e-6)
    free = x.gradient(case.own(x, *NEVER))
    assert (x.gradient(want) - free).abs().max() > 1e-3, "the clip never acted"


@pytest.mark.parametrize("divergence", INTERVALS)
def test_the_band_takes_the_gradient_that_the_rule_says(case: Case, divergence: str) -> None:
    x = case.fit(tokens(1))
    keep = gate(x, divergence)
    assert 0.1 < 1 - keep[x.mask.bool()].mean() < 0.9
    got, metrics = case.ours(x, "band", {"divergence": divergence, "delta": 0.05})
    # an engine's loss is a sum over tokens: a token whose advantage is 0 has no gradient
    reference = dataclasses.replace(x, advantages=x.advantages * keep)
    want = x.gradient(case.own(reference, *NEVER))
    torch.testing.assert_close(x.gradient(got), want, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got).all()
    seen = (keep[:1], x.mask[:1]) if case.rows else (keep, x.mask)  # prime-rl's metrics are of one sequence
    assert ours(metrics)["zero_grad"] == pytest.approx(float((1 - seen[0])[seen[1].bool()].mean()))


class Mine:
    """A clip of a user's own: any object."""

    uses_p = False

    def coefficient(self, tokens: Any) -> Tensor:
        return tokens.weighted * torch.exp(-tokens.log_r.square())


class Sampled(Mine):
    """One that looks at the sampler's log-probabilities as well."""

    needs = ("rollout_logps",)

    def coefficient(self, tokens: Any) -> Tensor:
        return tokens.weighted * torch.exp(tokens.rollout_logps)


class Entropic(Mine):
    needs = ("entropies",)


class Wider(bandpo.Region):
    """A region that is no two bounds by p alone: wider for positive advantages."""

    as_bounds, uses_p = False, False

    def bounds(self, log_p: Tensor) -> bandpo.Bounds:
        return bandpo.Fixed().bounds(log_p)

    def limits(self, tokens: bandpo.Tokens) -> bandpo.Bounds:
        half = torch.where(tokens.advantages > 0, 0.3, 0.1)
        return bandpo.Bounds(-half, half)


KINDS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "hard": ("band", {"divergence": "kl", "delta": 0.02}),
    "sides": ("sides", {"high": {"clip": "band", "delta": 0.02}, "low": "fixed"}),
    "a region of more than p": (Wider(), None),
    "mask": ("dppo_kl", {"delta": 0.02, "cap": 1.5}),
    "weight": ("cispo", {"eps_low": 0.2, "eps_high": 0.28}),
    "smooth": ("sapo", None),
    "decay": ("dgpo", {"region": {"clip": "band", "delta": 0.02}}),
    "sequence": ("gspo", {"eps_low": 0.05, "eps_high": 0.1}),
    "dual clip": ("dual_clip", {"cap": 1.3}),
    "a user's own": (Mine(), None),
    "the sampler's": (Sampled(), None),
    "entropies": (Entropic(), None),
}
SINGLE = {"torchrl_ppo": "torchrl's PPO has single actions", "rllib": "RLlib's minibatches have single actions"}
REFUSALS = {("sequence", engine): why for engine, why in SINGLE.items()}
REFUSALS |= {("entropies", engine): "needs entropies, which" for engine in CASES}
REFUSALS |= {
    ("the sampler's", engine): "with its one set of old log-probabilities, does not hand over"
    for engine in ("torchrl_ppo", "torchrl_grpo", "rllib", "prime_rl", "tinker")
}


def ours(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of the clip by their plain names."""
    found = {k: v for k, v in metrics.items() if k.startswith(("clip/", "clip_")) and k not in PLACES}
    return {name.removeprefix("clip/").removeprefix("clip_"): float(value) for name, value in found.items()}


PLACES = ("clip_fraction", "clip_ratio", "pg_clipfrac")  # the engines' own metrics of their clip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", CASES)
def test_every_kind_of_clip_has_its_coefficient_or_is_refused(engine: str, kind: str) -> None:
    case, (clip, clip_args) = CASES[engine](), KINDS[kind]
    answer = attempt(case, clip, clip_args)
    if (kind, engine) in REFUSALS:
        assert answer.startswith(REFUSED) and REFUSALS[kind, engine] in answer and "\n" not in answer
        assert "such as clip='band'" in answer
        return
    made, x = bandpo.get_clip(clip, **(clip_args or {})), case.fit(tokens(4))
    assert answer == ("policy_loss" if case.whole else "margins" if kind in ("hard", "sides") else "advantages")
    c, t = coefficient(case, x, made), x.seen()
    assert (c - t.weighted).abs().max() > 0.1, "the clip never acted"
    check_metrics(case, x, made, case.ours(x, clip, clip_args)[1])


def check_metrics(case: Case, x: Tokens, clip: bandpo.Clip, metrics: dict[str, Any]) -> None:
    """The clip's nine numbers are those of `clip_stats`, and the engine's own place has no other."""
    rows = slice(1) if case.rows else slice(None)
    seen = [y[rows] for y in (x.new(), x.old, x.advantages, x.mask)]
    want = bandpo.clip_stats(*seen, clip=clip, rollout_logps=seen[1] - 0.1).metrics(only=BRIEF)
    got = ours(metrics)
    assert got.keys() == set(BRIEF)
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    if case.clipped and not clip.as_bounds:
        assert float(metrics[case.clipped]) == pytest.approx(got["zero_grad"], abs=1e-6)


@pytest.mark.parametrize(("how_much", "keys"), [("none", 0), ("brief", 9), ("full", 200)])
@pytest.mark.parametrize("clip", ["band", "sapo"])
def test_how_much_is_reported(case: Case, clip: str, how_much: str, keys: int) -> None:
    x = case.fit(tokens())
    found = ours(case.ours(x, clip, None, how_much)[1])
    assert len(found) == keys if keys < 100 else len(found) > keys
    with pytest.raises(ValueError, match=r"'breif': must be one of brief, full, none \(did you mean 'brief'\?\)"):
        case.ours(x, clip, None, "breif")


@pytest.mark.parametrize("clip", ["cispo", "gspo", "sapo"])
def test_ratios_past_e_20_keep_their_coefficient(case: Case, clip: str) -> None:
    """There a host that is given advantages gets nearer log-probabilities, after c was computed from the true ones."""
    x = case.fit(tokens(5))
    x.logits = (15 * x.logits.detach()).requires_grad_()  # some have fallen far
    x.old = x.old - torch.tensor([30.0, 0.0, 0.0, 0.0, 25.0])  # and some have risen far
    try:
        loss, metrics = case.ours(x, clip, None)
    except bandpo.InputError:
        pytest.skip("refused; see the matrix")
    far = x.seen().log_r[x.mask.bool()]
    assert far.min() < -20 and far.max() > 20
    want = case.carries(x, coefficient(case, x, bandpo.get_clip(clip)))
    torch.testing.assert_close(x.gradient(loss), want, rtol=1e-5, atol=1e-6)
    assert all(math.isfinite(value) for value in ours(metrics).values())


@pytest.mark.parametrize("clip", ["band", "sapo", "dual_clip", "gspo"])
def test_padding_is_inert_whatever_it_holds(case: Case, clip: str) -> None:
    if not case.padded or not case.inert:
        pytest.skip("the engine has no padding here, or its own loss does not bear NaN in it")
    x = tokens(2)
    try:
        want, told = case.ours(x, clip, None)
    except bandpo.InputError:
        pytest.skip("refused; see the matrix")
    pad = x.mask == 0
    old, advantages = (torch.where(pad, torch.nan, y) for y in (x.old, x.advantages))
    dirty = dataclasses.replace(x, old=old, advantages=advantages)
    if case.takes_logps:
        dirty.new = lambda: torch.where(pad, torch.nan, x.new())  # type: ignore[method-assign]
    got, metrics = case.ours(dirty, clip, None)
    assert torch.equal(got, want) and torch.equal(x.gradient(got), x.gradient(want))
    assert x.gradient(got)[pad].abs().max() == 0
    assert ours(metrics) == ours(told)
    if case.clipped:
        assert float(metrics[case.clipped]) == float(told[case.clipped])


@pytest.mark.parametrize(
    "bad", [("bandd", None), ("band", {"detla": 1}), ("band", 0.05), (3, None), ("dgpo", {"region": "sapo"})]
)
def test_a_bad_clip_is_one_clear_line(case: Case, bad: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="clip|region") as error:
        case.ours(case.fit(tokens()), *bad)
    assert "\n" not in str(error.value)


def test_the_matrix_has_every_clip_of_every_engine() -> None:
    table = matrix()
    assert set(table) == {"trl", "verl", *CASES} and all(
        set(column) == set(bandpo.list_clips()) for column in table.values()
    )
    carried = {engine: column["sapo"] for engine, column in table.items() if "not tried" not in column["sapo"]}
    assert set(carried.values()) <= {"advantages", "policy_loss"} and len(carried) >= 2
    known = json.loads((DOCS / "data/engines.json").read_text())
    for engine in carried:
        assert known[engine] == {clip: short(word) for clip, word in table[engine].items()}, "run matrix.py again"
    assert as_markdown(known) in (DOCS / "engines.md").read_text(), "run matrix.py again"
