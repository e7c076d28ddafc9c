"""`bandpo.explain`: every number against numpy, scalar formulas or finite differences; what it says of five logs."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from truth.coefficients import FORMULAS, T, g

import bandpo
from bandpo import cli
from bandpo._input import InputError
from bandpo.analysis.explain import Explainer
from bandpo.analysis.tails import Tails
from bandpo.lab.token_log import open_log

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "examples" / "logs"
SHIPPED = ROOT / "src" / "bandpo" / "examples" / "tokens.npz"
EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)


def tokens(rows: int = 12, columns: int = 25, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens of a softmax over six words, float64, with padding; every optional tensor."""
    random = torch.Generator().manual_seed(seed)
    z = 2.0 * torch.randn(rows, columns, 6, generator=random, dtype=torch.float64)
    new = z + 0.4 * torch.randn(z.shape, generator=random, dtype=torch.float64)
    a = torch.multinomial(torch.softmax(z, -1).view(-1, 6), 1, generator=random).view(rows, columns, 1)
    engine = z + 0.3 * torch.randn(z.shape, generator=random, dtype=torch.float64)
    taken = [torch.log_softmax(x, -1).gather(-1, a)[..., 0] for x in (new, z, engine)]
    pi = torch.softmax(new, -1)
    return {
        "logps": taken[0],
        "old_logps": taken[1],
        "advantages": torch.randn(rows, generator=random, dtype=torch.float64),
        "mask": torch.arange(columns) < torch.randint(5, columns + 1, (rows, 1), generator=random),
        "rollout_logps": taken[2],
        "entropies": -(pi * pi.log()).sum(-1),
        "rewards": torch.arange(rows, dtype=torch.float64) % 2,
        "state_divergence": 0.1 * torch.rand(taken[1].shape, generator=random, dtype=torch.float64),
        "logits": new,
    }


def kept(t: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The unmasked tokens as one-dimensional arrays."""
    mask = t["mask"].numpy()
    wide = {k: x[:, None].expand(mask.shape) if x.dim() == 1 else x for k, x in t.items()}
    return {k: x.numpy()[mask] for k, x in wide.items() if k not in ("mask", "logits")}


def test_what_the_clip_does_equals_numpy() -> None:
    t = tokens()
    found = bandpo.explain(**t).to_dict()  # type: ignore[arg-type]
    x = kept(t)
    p, r, a = np.exp(x["old_logps"]), np.exp(x["logps"] - x["old_logps"]), x["advantages"]
    shut = ((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0))
    assert found["counts"]["tokens"] == len(p) and found["counts"]["sequences"] == 12
    assert found["counts"]["padding"] == 12 * 25 - len(p) and found["counts"]["rare"] == ((p < 0.1) & (a > 0)).sum()
    assert found["counts"]["surprise"] == pytest.approx(-x["old_logps"].mean())
    for row in found["effect"]:
        chosen = {"all": a == a, "positive": a > 0, "negative": a < 0}[row["sign"]].copy()
        if row["bucket"] != "all":
            low, high = map(float, row["bucket"][1:].split("-"))
            chosen &= (p > low) & (p <= high)
        assert row["tokens"] == chosen.sum()
        if not row["tokens"]:
            assert row["zero_grad"] is None and row["gradient_kept"] is None
            continue
        weight = np.abs(r * a)[chosen]
        assert row["zero_grad"] == pytest.approx(shut[chosen].mean())
        assert row["zero_grad_above"] == pytest.approx((shut & (r > 1))[chosen].mean())
        assert row["outside_below"] == pytest.approx((r < 0.8)[chosen].mean())
        assert row["outside_above"] == pytest.approx((r > 1.2)[chosen].mean())
        assert row["gradient_kept"] == pytest.approx(weight[~shut[chosen]].sum() / weight.sum())
        kl = [g("kl", *pair) for pair in zip(p[chosen], r[chosen], strict=True)]
        assert row["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-6) and row["kl_max"] == pytest.approx(max(kl))
    for name, row in found["divergence"].items():
        reached = np.sort([g(name, *pair) for pair in zip(p, r, strict=True)])
        assert row["mean"] == pytest.approx(reached.mean()) and row["max"] == pytest.approx(reached[-1], rel=1e-6)
        assert row["p99"] == pytest.approx(reached[round(0.99 * len(reached)) - 1], rel=1e-3)
    mask = t["mask"].numpy()
    log_r = np.where(mask, (t["logps"] - t["old_logps"]).numpy(), 0)
    k3 = (np.exp(log_r) - 1 - log_r).sum(1)
    assert found["sequence"]["kl_mean"] == pytest.approx(k3.mean()) and found["sequence"]["kl_max"] == pytest.approx(
        k3.max()
    )
    assert found["sequence"]["minus_log_ratio_mean"] == pytest.approx(-log_r.sum(1).mean())


def test_the_gap_to_the_rollout_engine_equals_numpy() -> None:
    t = tokens()
    x, gap = kept(t), bandpo.explain(**t).rollout  # type: ignore[arg-type]
    assert gap is not None
    p, d = np.exp(x["old_logps"]), x["old_logps"] - x["rollout_logps"]
    rows = [(gap, np.ones_like(p, dtype=bool))]
    for row in gap["by_bucket"]:
        low, high = map(float, row["bucket"][1:].split("-"))
        rows.append((row, (p > low) & (p <= high)))
    assert sum(row["tokens"] for row, _ in rows[1:]) == len(p)
    for row, chosen in rows:
        w = np.exp(d[chosen])
        assert row["k3"] == pytest.approx((w - 1 - d[chosen]).mean())
        assert row["beyond_2x"] == pytest.approx((np.abs(d[chosen]) > math.log(2)).mean())
        assert row["effective_sample_size"] == pytest.approx(w.sum() ** 2 / (len(w) * (w * w).sum()))
    mask = t["mask"].numpy()
    whole = np.exp(np.where(mask, (t["old_logps"] - t["rollout_logps"]).numpy(), 0).sum(1))
    want = whole.sum() ** 2 / (len(whole) * (whole**2).sum())
    assert gap["sequence_effective_sample_size"] == pytest.approx(want)


def test_the_gap_of_long_sequences_is_that_of_their_logarithms() -> None:
    torch.manual_seed(0)
    for gap in (-3.0, 3.0):  # products of e^1200, and of e^-1200
        old = torch.full((40, 400), -4.0) + 0.02 * torch.randn(40, 400)
        rollout = old - gap * torch.ones(400) + 0.05 * torch.randn(40, 1)
        explainer = Explainer()
        for i in (0, 10, 30):
            some = slice(i, {0: 10, 10: 30, 30: 40}[i])
            explainer.update(old[some], old[some], torch.ones(40)[some], rollout_logps=rollout[some])
        log_w = (old.double() - rollout.double()).sum(1).numpy()
        w = np.exp(log_w - log_w.max())
        found = explainer.compute().rollout
        assert found is not None
        assert found["sequence_effective_sample_size"] == pytest.approx(w.sum() ** 2 / (40 * (w * w).sum()))
        assert found["largest_log_ratio"] == pytest.approx(float((old - rollout).abs().max()))


def test_shares_of_the_advantages_signs_are_counted() -> None:
    for n in range(1, 60):
        made = Explainer(others=False)
        made.update(torch.full((60,), -1.0), torch.full((60,), -1.5), torch.where(torch.arange(60) < n, 1.0, -1.0))
        counts = made.compute().counts
        assert counts["zero"] == 0 and counts["positive"] == n / 60


def test_what_only_the_logits_or_the_sign_of_an_entropy_tells_is_left_out() -> None:
    logits = torch.randn(4, 6, 5)
    logits[1, 2, 3], logits[2, 0, 1], logits[3, 3, 0] = math.nan, math.inf, -math.inf
    logps = torch.full((4, 6), -1.0)
    found = bandpo.explain(logps, logps - 0.5, torch.ones(4), logits=logits)
    assert "logits is NaN or infinite for 2 tokens, the first at sequence 1, token 2; left out" in found.remarks
    assert found.counts["tokens"] == 22 and found.entropy is not None
    assert math.isfinite(found.entropy["logit_step"]["clip"])
    entropies = torch.ones(4, 6)
    entropies[1, 1] = -1.0
    found = bandpo.explain(logps, logps - 0.5, torch.ones(4) * torch.tensor([1, 1, 1, 1e35]), entropies=entropies)
    assert "entropies is below 0 for 1 token, the first at sequence 1, token 1; left out" in found.remarks
    assert "advantages is beyond 1e30 for 6 tokens, the first at sequence 3, token 0; left out" in found.remarks
    json.dumps(found.to_dict(), allow_nan=False)


def test_ratios_that_round_to_zero_are_no_idle_clip() -> None:
    for clip in ("dro", "vespo"):
        found = bandpo.explain(torch.full((4, 6), -200.0), torch.full((4, 6), -1.0), torch.ones(4), clip=clip)
        assert not found.idle["idle"] and found.effect[0]["gradient_kept"] is None
        assert str(found)


def test_every_other_clip_equals_its_formula() -> None:
    t = tokens()
    rows = {row["clip"]: row for row in bandpo.explain(**t).clips}  # type: ignore[arg-type]
    assert list(rows) == bandpo.list_clips() and not any(row["missing"] for row in rows.values())
    names = ("old_logps", "logps", "advantages", "entropies", "rewards", "state_divergence")
    wide = [t[k][:, None].expand(12, 25) if t[k].dim() == 1 else t[k] for k in names]
    table = torch.stack(wide, -1)
    batch = tuple(
        tuple(T(math.exp(x[0]), math.exp(x[1] - x[0]), *x[2:]) for x in row[m].tolist())
        for row, m in zip(table, t["mask"], strict=True)
    )
    flat = [x._replace(row=row, place=i, batch=batch) for row in batch for i, x in enumerate(row)]
    free = sum(abs(x.r * x.A) for x in flat)
    rare = [i for i, x in enumerate(flat) if x.p < 0.1 and x.A > 0]
    per_c = _logit_step(t)
    for name, row in rows.items():
        c = [FORMULAS[name](x) for x in flat]
        if name == "clip_cov":  # a hash says which one it drops besides
            assert 0 <= row["zero_grad"] * len(flat) - sum(y == 0 for y in c) <= 1 + 1e-9
            continue
        assert row["zero_grad"] == pytest.approx(sum(y == 0 for y in c) / len(c)), name
        assert row["zero_grad_rare"] == pytest.approx(sum(c[i] == 0 for i in rare) / len(rare)), name
        pushed = [y * math.copysign(1, x.A) for x, y in zip(flat, c, strict=True)]
        assert row["gradient_kept"] == pytest.approx(sum(max(y, 0) for y in pushed) / free, rel=1e-6), name
        assert row["gradient_opposed"] == pytest.approx(sum(max(-y, 0) for y in pushed) / free, rel=1e-6, abs=1e-12), (
            name
        )
        assert row["entropy"] == pytest.approx(np.dot(c, per_c) / len(c), rel=1e-5, abs=1e-9), name


def _entropy(z: np.ndarray) -> float:
    pi = np.exp(z - z.max())
    pi /= pi.sum()
    return float(-(pi * np.log(pi)).sum())


def _steps(t: dict[str, torch.Tensor], natural: bool) -> np.ndarray:
    """By finite differences: what a step along the gradient of log pi_a, or its natural one, does to the entropy."""
    found = []
    for z, logp in zip(t["logits"][t["mask"]].numpy(), t["logps"][t["mask"]].numpy(), strict=True):
        pi = np.exp(z - z.max())
        pi /= pi.sum()
        a = np.abs(np.log(pi) - logp).argmin()
        step = np.eye(len(z))[a] - pi
        if natural:  # the Fisher matrix of a softmax, inverted
            step = np.linalg.lstsq(np.diag(pi) - np.outer(pi, pi), step, rcond=1e-12)[0]
        h = 1e-4 / max(1.0, np.abs(step).max())
        found.append((_entropy(z + h * step) - _entropy(z - h * step)) / (2 * h))
    return np.array(found)


def _logit_step(t: dict[str, torch.Tensor]) -> np.ndarray:
    return _steps(t, natural=False)


def test_both_forms_of_the_entropy_are_the_derivatives_that_they_say() -> None:
    t = tokens()
    forms = bandpo.explain(**t).entropy  # type: ignore[arg-type]
    assert forms is not None
    x = kept(t)
    r, a = np.exp(x["logps"] - x["old_logps"]), x["advantages"]
    c = np.where(((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0)), 0, r * a)
    for name, natural in (("logit_step", False), ("natural_gradient", True)):
        d, form = _steps(t, natural), forms[name]
        assert form["clip"] == pytest.approx((c * d).mean(), rel=1e-5)
        assert form["no_clip"] == pytest.approx((r * a * d).mean(), rel=1e-5)
        assert form["clip_positive"] == pytest.approx((c * d * (a > 0)).sum() / len(c), rel=1e-5)
        assert form["clip_positive"] + form["clip_negative"] == pytest.approx(form["clip"])
    bare = {k: v for k, v in t.items() if k not in ("logits", "entropies")}
    assert bandpo.explain(**bare).entropy is None and "ntropy to first" not in str(bandpo.explain(**bare))  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", ["fixed", "clip_higher", "dppo_tv", "dual_clip", "gspo", "sapo", "dgpo", "vespo"])
def test_equal_radii_take_as_much_and_no_other_takes_as_nearly(clip: str) -> None:
    t = {k: tokens(60, 40)[k] for k in ("logps", "old_logps", "advantages", "mask")}
    found = bandpo.explain(**t, clip=clip).to_dict()  # type: ignore[arg-type]
    same, whole = found["equivalent"], found["effect"][0]
    by_count = same["by"] == "zero_gradient"
    assert by_count == (whole["zero_grad"] > 0)
    assert same["share"] == pytest.approx(whole["zero_grad"] if by_count else 1 - whole["gradient_kept"])
    if clip == "vespo":  # takes from tokens that no clip of the ratio would touch
        assert by_count is False and all(same[key] is None for key in ("band_kl", "fixed", "dppo_tv"))
        return
    makers = {"band_kl": "kl", "band_tv": "tv", "band_chi2": "chi2", "dppo_kl": None, "dppo_tv": None, "fixed": None}
    x = kept(t)
    p, r, a = np.exp(x["old_logps"]), np.exp(x["logps"] - x["old_logps"]), x["advantages"]
    out = (r - 1) * a > 0
    weight = np.ones_like(r) if by_count else np.abs(r * a)
    for key, divergence in makers.items():
        value, share = same[key]["value"], same[key]["share"]
        if key == "fixed":
            made: Any = bandpo.Fixed(min(value, 1.0), value)
        else:
            made = bandpo.Band(divergence, value) if divergence else bandpo.get_clip(key, delta=value, cap=None)
        stats = bandpo.clip_stats(**t, clip=made).metrics()  # type: ignore[arg-type]
        taken = stats["zero_grad"] if by_count else 1 - stats["gradient_kept"]
        assert float(taken) == pytest.approx(share, abs=1e-6), key
        name = divergence or key.removeprefix("dppo_")
        far = np.abs(r - 1) if key == "fixed" else np.array([g(name, *pair) for pair in zip(p, r, strict=True)])
        order = np.sort(far[out])
        every = [weight[out & (far > edge * (1 - 1e-9))].sum() / weight.sum() for edge in order]
        nearest = min(abs(s - same["share"]) for s in every)
        ties = np.diff(order).min() / order.max() < 1e-3  # bins are 0.1 % wide
        assert abs(share - same["share"]) <= nearest + (2 / len(r) if ties else 1e-9), key


def test_a_stream_is_the_whole() -> None:
    t = tokens(40, 30)
    del t["logits"]
    whole = bandpo.explain(**t, clip="gspo").to_dict()  # type: ignore[arg-type]
    stream = Explainer("gspo")
    for i in range(0, 40, 7):
        stream.update(**{k: x[i : i + 7] for k, x in t.items()})  # type: ignore[arg-type]
    parts = stream.compute().to_dict()
    batch = {row["clip"] for row in whole["clips"] if row["looks_at"] == "batch"}
    assert {"bapo", "m2po", "kl_cov", "clip_cov"} == batch
    for key in ("counts", "idle", "divergence", "sequence", "equivalent", "rollout", "entropy"):
        assert _numbers(parts[key]) == pytest.approx(_numbers(whole[key]), rel=1e-9), key
    for mine, theirs in zip(parts["clips"], whole["clips"], strict=True):
        if mine["clip"] not in batch:
            assert _numbers(mine) == pytest.approx(_numbers(theirs), rel=1e-9)
    again = bandpo.explain(**t, clip="gspo", batch=7).to_dict()  # type: ignore[arg-type]
    assert _numbers(again["clips"]) == pytest.approx(_numbers(parts["clips"]), rel=1e-9)
    assert _numbers(again["clips"]) != pytest.approx(_numbers(whole["clips"]), rel=1e-9), "a batch is what it is shown"


def _numbers(x: Any) -> list[float]:
    """All numbers of a nested value, in order."""
    if isinstance(x, dict):
        return [y for value in x.values() for y in _numbers(value)]
    if isinstance(x, list):
        return [y for value in x for y in _numbers(value)]
    return [float(x)] if isinstance(x, (int, float)) else []


def test_quantiles_and_thresholds_of_a_stream() -> None:
    x = np.exp(3 * np.random.default_rng(0).standard_normal(5000)).astype(np.float32)
    w = np.random.default_rng(1).random(5000)
    tails = Tails()
    for i in range(0, 5000, 999):
        tails.add(torch.from_numpy(x[i : i + 999]), torch.from_numpy(w[i : i + 999]))
    for share in (0.001, 0.5, 0.99, 1.0):
        assert tails.quantile(share) == pytest.approx(np.sort(x)[max(round(share * 5000), 1) - 1], rel=1e-3)
    value, found = tails.threshold(100)
    assert found == (x > value).sum() and abs(found - 100) <= 3
    value, found = tails.threshold(50.0, weighted=True)
    assert found == pytest.approx(w[x > value].sum()) and abs(found - 50) < 1.5
    assert Tails().quantile(0.5) == 0


# ---------------------------------------------------------------- what it says


def advice(found: bandpo.Explanation) -> dict[str, float]:
    return {x["page"].split("#")[1]: x["number"] for x in found.advice}


def explained(path: Path, **options: Any) -> bandpo.Explanation:
    log, explainer = open_log(path), Explainer(**options)
    for part in log.parts():
        explainer.update(**part)
    explainer.remarks += log.remarks
    return explainer.compute()


def test_idle_clips_are_told_apart() -> None:
    t = {k: tokens()[k] for k in ("logps", "old_logps", "advantages", "mask")}
    still = bandpo.explain(**t | {"logps": t["old_logps"].clone()})  # type: ignore[arg-type]
    assert (
        still.idle["why"] == "one_update"
        and still.idle["ratio_one"] == 1
        and advice(still) == {"is-the-clip-idle": 1.0}
    )
    assert all(still.equivalent[key] is None for key in ("band_kl", "fixed")) and still.equivalent["by"] is None
    near = bandpo.explain(**t | {"logps": t["old_logps"] - 0.01})  # type: ignore[arg-type]
    assert near.idle["why"] == "not_reached" and "is-the-clip-idle" in advice(near)
    assert near.equivalent["by"] is None and near.equivalent["fixed"]["value"] == pytest.approx(
        1 - math.exp(-0.01), rel=2e-3
    )
    none = bandpo.explain(**t, clip="none")  # type: ignore[arg-type]
    assert none.idle["why"] == "no_clip"
    useless = bandpo.explain(**t | {"advantages": torch.zeros(12, dtype=torch.float64)})  # type: ignore[arg-type]
    assert (
        useless.idle["why"] == "no_advantage" and "no gradient" in str(useless) or "none has a gradient" in str(useless)
    )
    acts = bandpo.explain(**t)  # type: ignore[arg-type]
    assert acts.idle["why"] is None and not acts.idle["idle"]
    halves = bandpo.get_clip("cispo", eps_high=-0.5)  # acts where every ratio is 1
    half = bandpo.explain(**t | {"logps": t["old_logps"].clone()}, clip=halves)  # type: ignore[arg-type]
    assert not half.idle["idle"] and half.effect[0]["gradient_kept"] == 0.5


def test_a_clip_that_takes_nothing_and_opposes_is_not_said_to_do_nothing() -> None:
    old = torch.full((2, 8), math.log(0.5))
    new, advantages = old + torch.tensor([[0.2], [-0.2]]), torch.tensor([1.0, -1.0])

    class Turns:
        def coefficient(self, t: bandpo.Tokens) -> torch.Tensor:
            return torch.where(torch.arange(8) == 0, -0.1, 1.2) * t.weighted

    found = bandpo.explain(new, old, advantages, clip=Turns())
    assert found.equivalent["by"] == "other" and found.equivalent["fixed"] is None and not found.idle["idle"]
    assert "no bound of the ratio changes gradients as this clip" in str(found) and "took nothing" not in str(found)


def test_rare_tokens_and_the_update_without_ratio_are_noticed() -> None:
    p = torch.tensor([[0.02] * 30 + [0.6] * 30])
    up = torch.cat([torch.full((1, 30), 1.5), torch.full((1, 30), 1.1)], 1)
    found = bandpo.explain((p * up).log(), p.log(), torch.ones(1))
    assert advice(found)["rare-tokens"] == 1.0 and "from 0 %" in found.advice[-1]["text"] + str(found)
    half = torch.where(torch.arange(60) % 2 == 0, up, 1.0)
    assert advice(bandpo.explain((p * half).log(), p.log(), torch.ones(1)))["is-the-clip-idle"] == 0.5


def _tokens_of(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ratio and advantage of each token of a record."""
    r = np.exp(np.subtract(row["logps"], row["old_logps"]))
    return r, np.full(len(r), row["advantages"])


def test_five_logs_of_different_origin() -> None:
    trl = torch.load(LOGS / "trl.pt", weights_only=True)
    found = explained(LOGS / "trl.pt")
    both = [torch.cat([x[k][x["completion_mask"].bool()] for x in trl]) for k in ("logps", "old_per_token_logps")]
    a = torch.cat([x["advantages"][:, None].expand_as(x["logps"])[x["completion_mask"].bool()] for x in trl])
    r = (both[0].double() - both[1].double()).exp()
    shut = ((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0))
    assert found.counts["tokens"] == len(r) and found.effect[0]["zero_grad"] == pytest.approx(
        shut.double().mean().item()
    )
    assert found.entropy is not None and found.entropy["natural_gradient"]["clip"] < 0 and advice(found)["entropy"] < 0

    batch = torch.load(LOGS / "verl.pt", weights_only=True)
    found = explained(LOGS / "verl.pt")
    mask = batch["response_mask"].bool()
    r = (batch["log_probs"] - batch["old_log_probs"])[mask].double().exp()
    weight = (r * batch["advantages"][mask]).abs()
    shut = ((r > 1.2) & (batch["advantages"][mask] > 0)) | ((r < 0.8) & (batch["advantages"][mask] < 0))
    part = (weight[~shut].sum() / weight.sum()).item()
    assert found.effect[0]["gradient_kept"] == pytest.approx(part, rel=1e-6) and 0.9 < part < 1
    still = (r == 1).double().mean().item()
    assert still == found.idle["ratio_one"] == pytest.approx(1 / 8, abs=1e-3), "of 8 updates the first"
    free = batch["old_log_probs"][mask] < -1e-3
    assert found.idle["why"] is None
    assert advice(found)["is-the-clip-idle"] == pytest.approx((r == 1)[free].double().mean().item())

    found = explained(LOGS / "idle.jsonl")
    records = [json.loads(line) for line in (LOGS / "idle.jsonl").read_text().splitlines()]
    assert all(x["logps"] == x["old_logps"] for x in records)
    assert found.counts["tokens"] == sum(len(x["logps"]) for x in records)
    assert found.idle["why"] == "one_update" and list(advice(found)) == ["is-the-clip-idle"]

    from pyarrow import parquet

    rows = parquet.read_table(LOGS / "gap.parquet").to_pylist()
    d = np.concatenate([np.subtract(x["old_logps"], x["rollout_logps"]) for x in rows])
    k3 = (np.expm1(d) - d).mean()
    found = explained(LOGS / "gap.parquet")
    assert k3 > 0.05 and next(iter(advice(found).items())) == ("which-old-policy", pytest.approx(k3, rel=1e-5))
    r, a = (np.concatenate(x) for x in zip(*map(_tokens_of, rows), strict=True))
    shut, weight = ((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0)), np.abs(r * a)
    assert advice(found)["how-much-is-too-much"] == pytest.approx(weight[~shut].sum() / weight.sum(), rel=1e-5)

    found = explained(LOGS / "collapse.npz")
    assert found.entropy is not None and found.entropy["logit_step"]["clip"] < 0
    arrays = np.load(LOGS / "collapse.npz")
    surprise = -arrays["old_logps"][arrays["mask"]].mean()
    assert surprise < 0.1 and found.advice[0]["number"] == pytest.approx(surprise, rel=1e-5)
    assert found.advice[0]["page"].endswith("#entropy")

    for path in (*LOGS.iterdir(), SHIPPED):
        found = explained(path)
        assert found.remarks == [], path  # nothing is odd, and nothing is called so
        assert 1 <= len(found.advice) <= 5


def test_the_logs_are_those_that_their_command_makes(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "examples" / "make_logs.py"))
    assert {path.name for path in LOGS.iterdir()} == set(made["LOGS"])
    for name in ("idle.jsonl", "gap.parquet", "collapse.npz"):  # the others are training runs
        made["LOGS"][name](tmp_path / name)
        mine, kept_ = (list(open_log(folder / name).parts()) for folder in (tmp_path, LOGS))
        for a, b in zip(mine, kept_, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.allclose(a[k].double(), b[k].double(), atol=1e-4) for k in a), name
    assert SHIPPED.stat().st_size <= 200_000
    assert sum(path.stat().st_size for path in LOGS.iterdir()) <= 250_000


def test_the_clip_that_records_in_verl_is_ppos_and_keeps_what_it_is_shown(tmp_path: Path) -> None:
    t = {k: x.float() for k, x in tokens().items() if k in ("logps", "old_logps", "advantages", "mask")}
    path = f"{ROOT / 'examples' / 'make_logs.py'}:Recording"
    clip = bandpo.get_clip(path, folder=str(tmp_path))
    for rows in (slice(0, 6), slice(6, 12)):
        part = bandpo.Tokens(*(x[rows] for x in t.values()))
        assert torch.equal(clip.coefficient(part), bandpo.Fixed(0.2, 0.2).coefficient(part))
    files = sorted(tmp_path.glob("*.pt"))
    torch.save([torch.load(file, weights_only=True) for file in files], tmp_path / "verl.pt")
    assert len(files) == 2
    found, want = explained(tmp_path / "verl.pt").to_dict(), bandpo.explain(*t.values()).to_dict()
    assert _numbers(found["effect"]) == pytest.approx(_numbers(want["effect"]), rel=1e-5)


def test_pages_that_advice_names_are_there() -> None:
    import re

    page = (ROOT / "docs" / "explain.md").read_text("utf-8")
    there = {re.sub(r"[^a-z0-9]+", "-", x.lower()).strip("-") for x in re.findall(r"^#+ (.*)$", page, flags=re.M)}
    named = re.findall(r'^\s+"([a-z-]+)",$', (ROOT / "src/bandpo/analysis/advice.py").read_text("utf-8"), flags=re.M)
    assert {"is-the-clip-idle", "entropy", "which-old-policy"} <= set(named) <= there


# ---------------------------------------------------------------- odd values


def simple(n: int = 40) -> dict[str, torch.Tensor]:
    t = tokens(10, n)
    return {k: t[k] for k in ("logps", "old_logps", "advantages")}


@pytest.mark.parametrize("name", ["logps", "old_logps"])
def test_values_that_cannot_be_are_counted_and_left_out(name: str) -> None:
    t = simple()
    bad = t[name].clone()
    bad[3, 7], bad[4, 0], bad[9, 1] = math.nan, math.inf, 0.5
    found = bandpo.explain(**t | {name: bad})
    assert f"{name} is NaN or infinite for 2 tokens, the first at sequence 3, token 7; left out" in found.remarks
    assert f"{name} is above 0 for 1 token, the first at sequence 9, token 1; left out" in found.remarks
    mask = torch.ones(10, 40)
    mask[3, 7] = mask[4, 0] = mask[9, 1] = 0
    clean = bandpo.explain(**t, mask=mask)
    assert found.counts["left_out"] == 3 and found.effect == clean.effect and found.divergence == clean.divergence
    rounded = bandpo.explain(**t | {name: torch.where(torch.arange(40) == 0, 0.004, t[name])})
    assert rounded.remarks == [], "a rounded 0"


def test_padding_without_a_mask_is_noticed() -> None:
    t = simple()
    padded = {k: torch.nn.functional.pad(x, (0, 5)) if x.dim() > 1 else x for k, x in t.items() if k != "mask"}
    assert any("give a mask or lengths" in x for x in bandpo.explain(**padded).remarks)
    mask = torch.nn.functional.pad(torch.ones_like(t["logps"]), (0, 5))
    assert bandpo.explain(**padded, mask=mask).remarks == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda x: 5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x),
            "these look like logits",
        ),
        (torch.exp, "these look like probabilities"),
        (torch.neg, "these look like -log p"),
    ],
)
def test_what_is_no_log_probability_is_recognised(change: Any, says: str) -> None:
    t = simple()
    with pytest.raises(InputError, match=says) as error:
        bandpo.explain(**t | {"logps": change(t["logps"])})
    assert "\n" not in str(error.value) and "logps holds" in str(error.value)


def test_logits_over_the_vocabulary_are_recognised() -> None:
    with pytest.raises(InputError, match=r"log_softmax\(logits, -1\) of the taken tokens"):
        bandpo.explain(torch.zeros(2, 3, 50), torch.zeros(2, 3, 50), torch.zeros(2))


def test_bits_are_implausible() -> None:
    t = {k: x for k, x in tokens(200, 100).items() if k in ("logps", "old_logps", "advantages", "rollout_logps")}
    assert bandpo.explain(**t).remarks == []
    bits = {k: x if k == "advantages" else x / math.log(2) for k, x in t.items()}
    assert any("may be in bits" in x for x in bandpo.explain(**bits).remarks)
    near = t | {"logps": t["old_logps"] + 0.01, "rollout_logps": t["old_logps"] - 0.01}
    near["logps"].clamp_(max=0)
    assert bandpo.explain(**near).remarks == []
    for name in ("logps", "old_logps", "rollout_logps"):
        for base, says in ((2, "in bits"), (10, "to base 10")):
            said = bandpo.explain(**near | {name: near[name] / math.log(base)}).remarks
            assert any(f"implausible, {name} looks to be {says}" in x for x in said), (name, base)
    h = tokens(200, 100)
    old_h = -(torch.softmax(h["logits"], -1) * torch.log_softmax(h["logits"], -1)).sum(-1)
    on_policy = {"logps": h["old_logps"], "old_logps": h["old_logps"] / math.log(2), "advantages": h["advantages"]}
    said = bandpo.explain(**on_policy | {"logps": on_policy["old_logps"].clone()}, entropies=old_h).remarks
    assert any("old_logps may be in bits" in x for x in said)


@pytest.mark.parametrize("path", [*sorted(LOGS.iterdir()), SHIPPED], ids=lambda x: x.name)
@pytest.mark.parametrize("name", ["logps", "old_logps"])
def test_bits_in_a_log_are_noticed(path: Path, name: str) -> None:
    explainer = Explainer(others=False)
    for part in open_log(path).parts():
        explainer.update(**part | {name: part[name] / math.log(2)})
    assert any(f"implausible, {name} looks to be in bits" in x for x in explainer.compute().remarks)


def test_few_tokens_and_none() -> None:
    one = bandpo.explain(torch.tensor([-0.5]), torch.tensor([-1.0]), torch.tensor([1.0]))
    assert one.counts["tokens"] == 1 and one.remarks == ["1 token: too few for shares and percentiles"] and str(one)
    assert one.sequence is None and {row["missing"] for row in one.clips if row["looks_at"] == "sequence"} >= {
        "sequences"
    }
    t = simple()
    with pytest.raises(InputError, match="no token to look at: mask is 0 everywhere"):
        bandpo.explain(**t, mask=torch.zeros(10, 40))
    with pytest.raises(InputError, match="no token to look at: logps is NaN or infinite for 400 tokens"):
        bandpo.explain(**t | {"logps": torch.full((10, 40), math.nan)})
    with pytest.raises(InputError, match="batch=0: must be a whole number"):
        bandpo.explain(**t, batch=0)
    with pytest.raises(InputError, match="old_logps has shape"):
        bandpo.explain(**t | {"old_logps": t["old_logps"][:, :-1]})
    with pytest.raises(InputError, match="needs entropies"):
        bandpo.explain(**t, clip="archer")
    with pytest.raises(InputError, match="rolout_logps"):
        Explainer().update(t["logps"], t["old_logps"], t["advantages"], rolout_logps=t["logps"])


def test_extreme_values_stay_finite() -> None:
    old = torch.tensor([[-300.0, -1e-7, -50.0, 0.0, -1.0]]).repeat(30, 1)
    new = torch.tensor([[-0.1, -200.0, -49.0, 0.0, -1.0]]).repeat(30, 1)
    for clip in bandpo.list_clips():
        if clip in ("archer", "dppo_topk", "topr"):
            continue
        found = bandpo.explain(new, old, torch.linspace(-1, 1, 30), clip=clip)
        json.dumps(found.to_dict(), allow_nan=False)
        assert str(found)


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_what_the_function_returns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "explain", str(LOGS / "trl.pt"), "--clip", "band", "--clip_args.delta", "0.02", "--json")
    found = json.loads(out)
    want = explained(LOGS / "trl.pt", clip="band", clip_args={"delta": 0.02}).to_dict()
    assert code == 0 and {k: found[k] for k in want} == json.loads(json.dumps(want))
    assert found["fields"]["old_logps"] == "old_per_token_logps"
    for words in (["--clip_args", '{"delta": 0.02}'], ["--clip_args.delta=0.02"]):
        again = run(capsys, "explain", str(LOGS / "trl.pt"), "--clip", "band", *words, "--json")[1]
        assert json.loads(again)["effect"] == found["effect"]
    text = run(capsys, "explain", "example")[1]
    assert "name yours with --clip" in text and "What to make of it" in text
    nested = ["--clip", "sides", "--clip_args.high.clip", "fixed", "--clip_args.high.eps_high", "0.5"]
    assert "eps_high=0.5" in run(capsys, "explain", "example", *nested)[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["examplee"], "did you mean 'example'?"),
        (["example", "--clip", "bnad"], "did you mean 'band'?"),
        (["example", "--clip_args.delta", "0.1"], "must come with --clip NAME"),
        (["example", "--clip", "band", "--clip_args.delta"], "has no value"),
        (["example", "--clip", "band", "--clip_args", "7"], "must be a JSON object"),
        (["example", "--clip", "band", "--htlm", "x"], "did you mean '--html'?"),
        (["example", "--clip", "topr"], "has no field rewards"),
        (["example", "--anchor", "both"], "has no field rollout_logps"),
        (
            ["example", "--clip", "fixed", "--clip_args", '{"eps_low": {"start": 0.2, "end": 0.1}}'],
            "changes over training",
        ),
        (["example", "--batch", "0"], "must be a whole number"),
        (["example", "--html", "no/such/folder.html"], "cannot be written"),
    ],
)
def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    code, out, err = run(capsys, "explain", *words)
    assert code == 2 and says in err and err.count("\n") == 1 and out == ""


def test_the_page_holds_the_numbers_and_fetches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from test_report import Page

    name = tmp_path / "<script>alert(1)<script>.pt"
    name.write_bytes((LOGS / "trl.pt").read_bytes())
    for clip in ("clip_higher", "sapo"):
        out = tmp_path / f"{clip}.html"
        assert run(capsys, "explain", str(name), "--clip", clip, "--html", str(out))[0] == 0
        html = out.read_text("utf-8")
        page, found = Page(html), explained(LOGS / "trl.pt", clip=clip)
        assert page.addresses == [] or all(x.startswith(("#", "data:")) for x in page.addresses)
        assert html.count("<svg") == 2 and "<script>alert" not in html
        for share in (found.effect[0]["gradient_kept"], found.clips[4]["zero_grad"]):
            assert f"{100 * share:.3g} %" in page.text
        assert all(x["text"] in page.text for x in found.advice)
    assert "no region by probability" in page.text and "from old_logps" not in page.text
    words = ["--anchor", "both", "--html", str(tmp_path / "anchor.html")]
    assert run(capsys, "explain", str(LOGS / "gap.parquet"), *words)[0] == 0
    assert "are from old_logps, not by anchor=both" in Page((tmp_path / "anchor.html").read_text("utf-8")).text


def test_what_the_anchor_leaves_alone_is_said_where_it_stands() -> None:
    old, both = (explained(LOGS / "gap.parquet", anchor=anchor) for anchor in ("old", "both"))
    assert (old.clip["anchor"], both.clip["anchor"]) == ("old", "both")
    assert both.clips == old.clips and both.divergence == old.divergence and both.effect != old.effect
    assert "from old_logps" not in str(old)
    for title in ("What each clip would do to these tokens", "Divergence reached, a token", "Equal to this clip here"):
        assert f"{title}, from old_logps, not by anchor=both" in str(both)
    assert max(map(len, str(both).splitlines())) <= 110


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("count", [2_000_000])
def test_memory_stays_below_a_gigabyte(tmp_path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    old = -random.exponential(1.0, (count // 1000, 1000)).astype(np.float32)
    arrays = {"old_logps": old, "logps": np.minimum(old + 0.1, 0), "advantages": random.standard_normal(len(old))}
    np.savez(tmp_path / "large.npz", **arrays)  # type: ignore[arg-type]
    code = (
        "import sys; from bandpo import cli; "
        f"cli.main(['explain', {str(tmp_path / 'large.npz')!r}, '--json']); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads wait for each other where the machine is busy
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=one)
    # kilobytes; ru_maxrss would count the process that started this one
    assert json.loads(done.stdout)["counts"]["tokens"] == count and int(done.stderr.split()[-1]) < 1e6


# ---------------------------------------------------------------- the page of the documentation

PAGE = (ROOT / "docs" / "explain.md").read_text("utf-8")


EXCERPT = "(excerpt)\n"


def blocks(language: str) -> list[tuple[str, str | None]]:
    """The page's blocks of a language, each with the text that follows at once, and the mark of one that has gaps."""
    import re

    text = r"(?:\n(\(excerpt\)\n)?\n?```text\n(.*?)^```)?"
    found = re.findall(rf"^```{language}\n(.*?)^```\n{text}", PAGE, flags=re.M | re.S)
    return [(code, mark + shown or None) for code, mark, shown in found]


@pytest.mark.parametrize(("lines", "shown"), blocks("bash"))
def test_the_pages_commands_print_what_is_shown(
    lines: str, shown: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for line in lines.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "bandpo" and run(capsys, *words)[0] == 0, line
    if shown:  # an excerpt of the last one's output, in whole lines
        whole = run(capsys, *words)[1]
        out, lines_ = iter(whole.splitlines()), shown.removeprefix(EXCERPT)
        assert [line for line in lines_.splitlines() if line and line not in out] == []
        assert shown.startswith(EXCERPT) == (whole != lines_), "what leaves lines out says so"


def test_the_pages_blocks_print_what_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code, shown in blocks("python"):
        exec(compile(code, "explain.md", "exec"), names)
        assert capsys.readouterr().out == (shown or "")
    assert run(capsys, "explain", "tokens.pt")[0] == 0


def test_the_pages_excerpts_are_there() -> None:
    import re

    source = (ROOT / "examples" / "make_logs.py").read_text("utf-8")
    named = re.findall(r'^--8<-- "examples/make_logs.py:(\w+)"$', PAGE, flags=re.M)
    assert named == ["trl", "verl"] and all(f"[{end}:{name}]" in source for name in named for end in ("start", "end"))


@pytest.mark.parametrize("format", [".npz", ".pt", ".pth", ".bin", ".jsonl", ".parquet"])
def test_the_page_has_every_format_and_field(format: str) -> None:
    from bandpo.lab.token_log import NAMES
    from bandpo.lab.token_sources import FORMATS

    assert format in FORMATS and f"`{format}`" in PAGE and len(FORMATS) == 6
    assert all(f"`{name}`" in PAGE for ours, names in NAMES.items() for name in (ours, *names))


def test_the_default_device_makes_no_difference() -> None:
    t = simple() | {"rollout_logps": simple()["old_logps"]}
    want = str(bandpo.explain(**t, entropies=-t["old_logps"]))
    torch.set_default_device("meta")
    try:
        assert str(bandpo.explain(**t, entropies=-t["old_logps"])) == want
    finally:
        torch.set_default_device(None)
