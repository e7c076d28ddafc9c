"""The contract of every clip of the registry: against scalar formulas, through autograd, on hostile input, compiled."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import shutil
from typing import Any

import pytest
import torch
from truth.coefficients import FORMULAS, VARIANTS, T, covariance

import bandpo
from bandpo.clips import CLIPS
from bandpo.testing import check_clip

CASES = [(name, args) for name in bandpo.list_clips() for args in ({}, *VARIANTS.get(name, []))]
each_case = pytest.mark.parametrize(
    ("name", "args"), [pytest.param(n, a, id=f"{n}-{i}") for i, (n, a) in enumerate(CASES)]
)
each_clip = pytest.mark.parametrize("name", bandpo.list_clips())

P = (1e-6, 1e-3, 0.01, 0.06, 0.08, 0.2, 0.5, 0.7, 0.9, 0.99)
R = (0.01, 0.3, 0.52, 0.77, 0.83, 0.96, 1.0, 1.004, 1.07, 1.21, 1.31, 1.7, 2.6, 3.5, 11.0, 30.0)
A = (-2.0, -0.5, 1.5)


def grid(rows: int = 16, columns: int | None = None) -> tuple[torch.Tensor, ...]:
    """Log-probabilities and advantages of every (p, r, A) with q < 1, as sequences; no two ratios but 1 are the same.

    Of four sequences one has fallen by half, and one has hardly moved.
    """
    points = [(p, r, a) for p in P for r in R for a in A if p * r < 1]
    points = [points[(37 * i) % len(points)] for i in range(len(points) // 16 * 16)]  # mixed
    p, r, a = torch.tensor(points, dtype=torch.float64).view(16, -1, 3)[:rows, :columns].unbind(-1)
    row = torch.arange(rows)[:, None]
    fallen, hardly = row % 4 == 1, row % 4 == 3
    r = torch.where((r == 1) & ~fallen, r, r * (1 - 1e-4 * fractions(r, 0.61803)))
    log_r = r.log() * torch.where(hardly, (row + 1) / 200, 1.0) - torch.where(fallen, math.log(2.0), 0.0)
    return p.log() + log_r, p.log(), a


def fractions(like: torch.Tensor, step: float) -> torch.Tensor:
    """Numbers spread over [0, 1)."""
    return (step * torch.arange(like.numel(), dtype=torch.float64)).frac().view_as(like)


def optional(like: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that only some clips look at."""
    return {
        "entropies": 2.3 * fractions(like, 0.36603),
        "rewards": torch.arange(len(like), dtype=torch.float64) % 3 - 1,  # of the sequence
        "state_divergence": 0.1 * fractions(like, 0.75488),
    }


def needed(clip: Any, like: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: x.to(like.dtype) for key, x in optional(like).items() if key in clip.needs}


def written(name: str, args: dict[str, Any], nudge: float = 0.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """c by the scalar formula, 0 in padding; `nudge` moves every ratio a little, to find the kinks."""
    return for_each(lambda t: FORMULAS[name](t, **args), nudge, mask)


def for_each(formula: Any, nudge: float = 0.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A function of every token of the grid, whose sequences have only those tokens that the mask leaves."""
    logps, old, advantages = grid()
    mask = torch.ones_like(old, dtype=torch.bool) if mask is None else mask
    each = [old.exp(), (logps - old + nudge).exp(), advantages]
    each += [x.view(len(old), -1).expand_as(old) for x in optional(old).values()]
    rows = zip(torch.stack(each, -1), mask, strict=True)
    batch = tuple(tuple(T(*numbers) for numbers in row[real].tolist()) for row, real in rows)
    tokens = [t._replace(row=row, place=i, batch=batch) for row in batch for i, t in enumerate(row)]
    return torch.zeros_like(old).masked_scatter(mask, torch.tensor([formula(t) for t in tokens], dtype=torch.float64))


def with_dropped(want: torch.Tensor, got: torch.Tensor, clip: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`want`, and 0 for the tokens that Clip-Cov has dropped: a hash says which, and no formula knows.

    They are as many as its fraction of all tokens, if there are so many with a covariance in its range that the gate
    leaves open.
    """
    if clip.name != "clip_cov":
        return want
    may_drop = (for_each(lambda t: clip.low < covariance(t) < clip.high, mask=mask) > 0) & (want != 0)
    tokens = want.numel() if mask is None else int(mask.sum())
    dropped = (got == 0) & (want != 0)
    assert may_drop[dropped].all() and dropped.sum() == min(max(1, int(clip.fraction * tokens)), may_drop.sum())
    return want.where(~dropped, 0.0)


def test_every_clip_has_a_formula() -> None:
    assert list(CLIPS) == bandpo.list_clips() and set(VARIANTS) <= FORMULAS.keys() == CLIPS.keys()
    for name, kind in CLIPS.items():
        mine, theirs = (inspect.signature(f).parameters for f in (kind, FORMULAS[name]))
        assert kind.name == name and list(mine) == list(theirs)[1:]
        named = kind.paper or "Source: " in (kind.__doc__ or "") or name in ("none", "sides", "intersection")
        assert named, f"{name}: its docstring names no source"
        for key, parameter in mine.items():
            want = theirs[key].default
            is_clip = isinstance(parameter.default, bandpo.clips.Clip)
            assert parameter.default == (bandpo.get_clip(want) if is_clip else want), (name, key)


@each_case
def test_c_is_the_formula(name: str, args: dict[str, Any]) -> None:
    logps, old, advantages = grid()
    want, low, high = (written(name, args, nudge) for nudge in (0.0, -1e-9, 1e-9))
    smooth = (high - low).abs() <= 1e-6 * want.abs() + 1e-9
    assert smooth.double().mean() > 0.9
    clip = bandpo.get_clip(name, **args)
    some = needed(clip, old)
    x = logps.clone().requires_grad_()
    loss = bandpo.policy_loss(x, old, advantages, clip=clip, aggregation="sum", **some).loss
    got = -torch.autograd.grad(loss, x)[0]
    want = with_dropped(want, got, clip)
    torch.testing.assert_close(got[smooth], want[smooth], rtol=1e-7, atol=1e-9)
    for form, factor in (("ratio", (logps - old).exp()), ("logp", 1.0)):
        got = bandpo.clip_advantages(logps, old, advantages, clip=name, clip_args=args, form=form, **some) * factor
        torch.testing.assert_close(got[smooth], want[smooth], rtol=1e-6, atol=1e-9)


@each_case
def test_padding_is_no_token(name: str, args: dict[str, Any]) -> None:
    """Sequences of different lengths, one without tokens, padded left and right and within, by anything."""
    logps, old, advantages = grid()
    place, row = torch.arange(old.shape[1]), torch.arange(len(old))[:, None]
    mask = (place < 2 * row) & (place >= row % 3) & (place % 7 != row)
    clip = bandpo.get_clip(name, **args)
    every = {"logps": logps, "old_logps": old, "advantages": advantages, **needed(clip, old)}
    given = {key: x.where(mask, math.nan) if x.dim() == 2 else x for key, x in every.items()}
    got = clip.coefficient(bandpo.Tokens(mask=mask, **given))
    want = with_dropped(written(name, args, mask=mask), got, clip, mask)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@each_case
def test_contract(name: str, args: dict[str, Any]) -> None:
    check_clip(bandpo.get_clip(name, **args))


@each_clip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_forms_of_advantages(name: str, dtype: torch.dtype) -> None:
    logps, old, advantages = (x.to(dtype) for x in grid())
    some = needed(bandpo.get_clip(name), old)
    result = bandpo.clip_advantages(logps, old, advantages, clip=name, **some)
    assert result.dtype == dtype and result.shape == logps.shape and not result.requires_grad
    c = bandpo.get_clip(name).coefficient(bandpo.Tokens(logps, old, advantages, **some))
    assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    row, every = (
        bandpo.clip_advantages(logps, old, x, clip=name, **some)
        for x in (advantages[:, 0], advantages[:, :1].expand_as(logps))
    )
    assert torch.equal(row, every)


MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASKS += (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("mask_dtype", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_mask_of_0_and_1_is_the_same_mask(mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    logps, old, advantages = (x.to(dtype) for x in grid())
    boolean = torch.arange(logps.shape[1]) < torch.arange(20, 36)[:, None]
    for clip in ("band", "gspo"):
        for aggregation in ("token-mean", "seq-mean-token-mean", "none"):
            mask = boolean.to(mask_dtype)
            want, got = (
                bandpo.policy_loss(logps, old, advantages, m, clip=clip, aggregation=aggregation)
                for m in (boolean, mask)
            )
            assert torch.equal(mask, boolean.to(mask_dtype)), "the caller's mask was changed"
            assert torch.equal(got.loss, want.loss) and got.metrics.keys() == want.metrics.keys()
            assert all(torch.equal(got.metrics[k], want.metrics[k]) for k in want.metrics)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@each_clip
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    logps, old, advantages = (x.float() for x in grid(rows=4, columns=8))
    mask, clip = torch.ones_like(logps), bandpo.get_clip(name, **({"step": 0.4} if name == "bapo" else {}))
    some = needed(clip, old)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = bandpo.policy_loss(x, old, advantages, mask, clip=clip, metrics=False, **some).loss
        return loss, bandpo.clip_advantages(x, old, advantages, mask, clip=clip, **some)

    x, y = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    got, want = torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(y)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got[0].backward(), want[0].backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("name", ["sapo", "dppo_kl", "gspo"])
def test_inductor(name: str) -> None:
    torch._dynamo.reset()
    logps, old, advantages = (x.float() for x in grid())
    logps[0, :8], old[0, :8] = -1.5e-6, -1e-6

    def advantages_of(x: torch.Tensor) -> torch.Tensor:
        return bandpo.clip_advantages(x, old, advantages, clip=name)

    got, want = torch.compile(advantages_of, fullgraph=True)(logps), advantages_of(logps)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("mask", "divergence"), [("dppo_tv", "tv"), ("dppo_kl", "kl")])
def test_dppos_mask_and_the_band_have_one_zero_set(mask: str, divergence: str) -> None:
    logps, old, advantages = grid()
    band = bandpo.Band(divergence, delta=0.05)
    ours, theirs = (
        bandpo.clip_advantages(logps, old, advantages, clip=clip) for clip in (band, bandpo.get_clip(mask, delta=0.05))
    )
    assert torch.equal(ours == 0, theirs == 0) and 0.1 < (ours == 0).double().mean() < 0.5
    kept = ours != 0
    truncated = (logps - old).exp() > 20
    assert torch.equal(ours[kept & ~truncated], theirs[kept & ~truncated]) and (kept & truncated).any()


def test_sides_by_default_gives_room_to_rise_and_none_to_fall() -> None:
    sides = bandpo.Sides()
    assert (
        sides == bandpo.Sides(high=bandpo.Band("kl", 0.05), low=bandpo.Fixed(eps_low=0.2)) == bandpo.get_clip("sides")
    )
    recipe = {"high": {"clip": "band", "delta": 0.05}, "low": {"clip": "fixed", "eps_low": 0.2}}
    assert bandpo.get_clip("sides", **recipe) == sides
    assert bandpo.get_clip("sides", high="clip-higher").high == bandpo.get_clip("clip_higher")


class Leaky:
    """A stranger's clip: a leaky hard gate."""

    def __init__(self, leak: float = 0.1) -> None:
        self.leak = leak

    def coefficient(self, tokens: bandpo.Tokens) -> torch.Tensor:
        outward = (tokens.rise.abs() > 0.2) & (tokens.rise * tokens.advantages > 0)
        return torch.where(outward, self.leak, 1.0) * tokens.ratio * tokens.advantages


def test_a_strangers_clip(tmp_path: Any) -> None:
    logps, old, advantages = grid()
    want = Leaky().coefficient(bandpo.Tokens(logps, old, advantages))
    check_clip(Leaky())
    assert torch.equal(bandpo.clip_advantages(logps, old, advantages, clip=Leaky(), form="logp"), want)
    metrics = bandpo.policy_loss(logps, old, advantages, clip=Leaky()).metrics
    assert 0 < metrics["gradient_kept"] < 1 and metrics["zero_grad"] == 0 and metrics["outside_above"] == 0
    file = tmp_path / "mine.py"
    source = inspect.getsource(Leaky).replace("bandpo.Tokens", "object").replace("torch.Tensor", "object")
    file.write_text(f"import torch\n\n\n{source}\nready = Leaky(0.5)\n")
    made = bandpo.get_clip(f"{file}:Leaky", leak=0.1)
    assert torch.equal(made.coefficient(bandpo.Tokens(logps, old, advantages)), want)
    assert bandpo.get_clip(f"{file}:ready").coefficient(bandpo.Tokens(logps, old, advantages)).shape == want.shape
    with pytest.raises(bandpo.InputError, match="has no argument 'leek' .did you mean 'leak'"):
        bandpo.get_clip(f"{file}:Leaky", leek=0.1)


def clip_that(coefficient: Any) -> Any:
    return type("Broken", (), {"coefficient": staticmethod(coefficient)})()


X = torch.full((2, 3), -1.0)
BAD = {
    "not a clip": (lambda: bandpo.get_clip(3), "clip=3: must be a name"),
    "the class itself": (lambda: bandpo.get_clip(Leaky), "must be a name"),
    "no file": (lambda: bandpo.get_clip("nowhere/at_all.py:Clip"), "no such file"),
    "no module": (lambda: bandpo.get_clip("no.such.module:Clip"), "No module named"),
    "no name in it": (lambda: bandpo.get_clip("bandpo.clips.sapo:Sappo"), "did you mean 'Sapo'"),
    "misspelt": (lambda: bandpo.get_clip("clip-hihger"), "did you mean 'clip_higher'"),
    "misspelt in a recipe": (lambda: bandpo.get_clip("sides", low={"clip": "fixed", "eps_lo": 0.1}), "'eps_low'"),
    "a side without a name": (lambda: bandpo.get_clip("sides", low={"eps_low": 0.1}), "must name its clip"),
    "a side that is none": (lambda: bandpo.get_clip("sides", low="sapo"), "low=Sapo("),
    "a region where none goes": (lambda: bandpo.get_clip("cispo", region="band"), "no argument 'region'; it takes eps"),
    "a region and margins": (lambda: bandpo.get_clip("dgpo", region="band", eps_low=0.1), "eps_low=0.1 with region="),
    "a region that is none": (lambda: bandpo.get_clip("dual_clip", region="gspo"), "region=Gspo("),
    "arguments of a made clip": (
        lambda: bandpo.clip_advantages(X, X + 0, X, clip=Leaky(), clip_args={"leak": 1}),
        "made",
    ),
    "the same tensor": (lambda: bandpo.clip_advantages(X, X, X), "once a rollout"),
    "form": (lambda: bandpo.clip_advantages(X, X + 0, X, form="ration"), "did you mean 'ratio'"),
    "advantages": (lambda: bandpo.clip_advantages(X, X + 0, X[:, :2]), "advantages has shape (2, 2)"),
    "advantages of integers": (lambda: bandpo.clip_advantages(X, X + 0, X.long()), "a floating-point tensor"),
    "no mask": (lambda: bandpo.clip_advantages(X, X + 0, X, X[0]), "mask is torch.float32, shape (3,)"),
    "a mask of 2": (
        lambda: bandpo.policy_loss(X, X + 0, X, 2 * torch.ones_like(X), validate=True),
        "other than 0 and 1",
    ),
    "sequences": (lambda: bandpo.clip_advantages(X[0], X[0] + 0, X[0], clip="gspo"), "needs (batch, token)"),
    "wrong shape": (lambda: bandpo.policy_loss(X, X + 0, X, clip=clip_that(lambda t: t.p.sum())), "of shape ()"),
    "nothing": (lambda: bandpo.policy_loss(X, X + 0, X, clip=clip_that(lambda t: None)), "is NoneType"),
    "nan": (
        lambda: bandpo.policy_loss(X, X + 0, X, clip=clip_that(lambda t: t.p * math.nan)),
        "nan at p = 0.368, r = 1",
    ),
    "exact value": (lambda: bandpo.policy_loss(X, X + 0, X, clip="sapo", exact_value=True), "clip 'sapo' defines a"),
    "None": (lambda: bandpo.policy_loss(X, X + 0, X, clip=None), "clip=None: must be a name"),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_one_line(how: str) -> None:
    call, words = BAD[how]
    with pytest.raises(bandpo.InputError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_are_frozen_and_equal_values_are_no_error() -> None:
    t = bandpo.Tokens(X, X + 0, X)
    with pytest.raises(AttributeError, match="never changes"):
        t.advantages = X
    assert torch.equal(bandpo.clip_advantages(X, X + 0, X, clip="band"), X)
    assert (t.rise == 0).all() and torch.equal(t.rest, -torch.expm1(X)) and torch.equal(t.p, X.exp())


@each_clip
def test_clips_are_values_that_survive_pickling(name: str) -> None:
    clip = bandpo.get_clip(name)
    assert pickle.loads(pickle.dumps(clip)) == clip and dataclasses.is_dataclass(clip)
    assert bandpo.get_clip(name.replace("_", "-")) == clip and bandpo.get_clip(clip) is clip
    for divergence in ("kl", "hellinger", "js", "alpha:0.5"):
        held = bandpo.Band(bandpo.get_divergence(divergence))
        assert torch.equal(pickle.loads(pickle.dumps(held)).bounds(X).log_high, held.bounds(X).log_high)


def test_a_second_derivative_is_an_error_and_not_0() -> None:
    x = X.clone().requires_grad_()
    loss = bandpo.policy_loss(x, X - 0.1, X).loss * x.sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
