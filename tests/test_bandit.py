"""The bandit: its exact gradient against autograd and brute force, its simulation against a plain training loop."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from truth.coefficients import FORMULAS, T

import bandpo
from bandpo import InputError
from bandpo.cli import main
from bandpo.lab import bandit, bandit_config
from bandpo.lab.bandit import Optimizer, Rollout, Trace, look, simulate, start_logps
from bandpo.lab.bandit_config import BUILT_IN, Setting, make_setting, read_study
from bandpo.lab.bandit_exact import (
    batch_drift,
    drift_table,
    entropy_drift,
    exact_drift,
    noise_states,
    ratio,
    single_moves,
)
from bandpo.lab.bandit_outcomes import first_times, mean, median, outcomes, run_study, wilson
from bandpo.lab.reading import read_yaml

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "studies" / "bandit.yaml"
SINGLE = [name for name in bandpo.list_clips() if bandpo.get_clip(name).looks_at != "batch"]


def make(**given: Any) -> Setting:
    base = {"reward": "rare", "actions": 12, "good_p": 0.05, "samples": 16, "seeds": 3, "rollouts": 3, "updates": 4}
    if given.get("reward") == "noise":
        del base["good_p"]
    return make_setting("s", {**base, "dtype": "float64", "arms": {"none": {"clip": "none"}}, **given})


def policies(states: int, actions: int, move: float = 0.4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    old = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    new = old + move * torch.randn(states, actions, generator=generator, dtype=torch.float64)
    return old.log_softmax(-1), new.log_softmax(-1)


def truth_c(name: str, log_p: Tensor, log_q: Tensor, advantages: Tensor, rewards: Tensor) -> Tensor:
    """C of every action and advantage by the written formulas, one token at a time."""
    p, found = log_p.exp(), torch.zeros_like(advantages)
    entropies, kl = -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)
    for (s, a, m), A in np.ndenumerate(advantages.numpy()):
        ratio = float((log_q[s, a] - log_p[s, a]).exp())
        t = T(float(p[s, a]), ratio, float(A), float(entropies[s]), float(rewards[s, a, m]), float(kl[s]))
        found[s, a, m] = FORMULAS[name](t._replace(row=(t,)))
    return found


# ---------------------------------------------------------------- the sum


@pytest.mark.parametrize("name", SINGLE)
def test_the_sum_is_what_autograd_finds_for_the_written_formula(name: str) -> None:
    log_p, log_q = policies(3, 7)
    advantages = torch.tensor([[1.3, -0.4], [0.7, -2.0]] * 3 + [[1.0, -1.0]], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, 7, 2)
    shares = log_p.exp()[..., None] * torch.tensor([0.3, 0.7], dtype=torch.float64)
    c = truth_c(name, log_p, log_q, advantages.expand(3, 7, 2), rewards)

    logits = log_q.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    objective = (shares * c * log_pi[..., None]).sum()
    (gradient,) = torch.autograd.grad(objective, logits, retain_graph=True)
    (slope,) = torch.autograd.grad(-(log_pi.exp() * log_pi).sum(), logits)
    found = entropy_drift(name, log_p, log_q, advantages, shares, rewards)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.entropy, (slope * gradient).sum(-1), rtol=1e-9, atol=1e-12)


def test_the_sum_is_what_ten_thousands_of_samples_find() -> None:
    log_p, log_q = policies(1, 9, move=0.6)
    draw, n = np.random.default_rng(3), 400_000
    p, q = log_p[0].exp().numpy(), log_q[0].exp().numpy()
    actions, A = draw.choice(9, n, p=p / p.sum()), draw.choice([1.0, -1.0], n)
    r = (q / p)[actions]
    c = np.where(((r > 1.28) & (A > 0)) | ((r < 0.8) & (A < 0)), 0.0, r * A)
    steps = c[:, None] * (np.eye(9)[actions] - q)
    found = entropy_drift("clip_higher", log_p[0], log_q[0], torch.tensor([1.0, -1.0]))
    error = (steps.mean(0) - found.gradient.numpy()) / (steps.std(0) / math.sqrt(n))
    assert np.abs(error).max() < 4 and np.abs(found.gradient.numpy() / steps.std(0) * math.sqrt(n)).max() > 20
    slope = -q * (np.log(q) - (q * np.log(q)).sum())
    assert abs((steps @ slope).mean() - found.entropy) < 4 * (steps @ slope).std() / math.sqrt(n)
    jacobian = np.diag(q) - np.outer(q, q)
    moved = np.abs(jacobian @ steps.T).sum(0) / 2
    assert abs(moved.mean() - found.moved) < 4 * moved.std() / math.sqrt(n)


def test_the_move_of_a_single_sample_is_the_softmax_jacobian_times_it() -> None:
    pi = policies(4, 6)[1].exp()
    jacobian = torch.diag_embed(pi) - pi[..., None] * pi[:, None, :]
    steps = torch.eye(6, dtype=torch.float64) - pi[:, None, :]
    torch.testing.assert_close(single_moves(pi), (steps @ jacobian).abs().sum(-1) / 2)


def test_without_a_clip_noise_does_not_move_entropy_and_on_policy_no_region_does() -> None:
    log_p, log_q = policies(5, 8)
    coin = torch.tensor([1.0, -1.0])
    assert entropy_drift("none", log_p, log_q, coin).entropy.abs().max() < 1e-15
    assert entropy_drift("fixed", log_p, log_p, coin).entropy.abs().max() < 1e-15
    assert entropy_drift("fixed", log_p, log_q, coin).entropy.abs().min() > 1e-4


@pytest.mark.parametrize("minibatches", [1, 16])
def test_the_simulation_of_every_clip_holds_the_sum(minibatches: int) -> None:
    setting = make(
        reward="noise", start="rank", actions=60, samples=128, seeds=24, updates=16, minibatches=minibatches, lr=0.04
    )
    table = drift_table(setting)
    assert {row["name"] for row in table} == set(bandpo.list_clips())
    batch = [row for row in table if row["name"] not in SINGLE]
    assert batch == table[-4:] and all(math.isnan(row["exact"]) and row["own"] != 0 for row in batch)
    table = table[:-4]
    width = {row["name"]: row["simulated_high"] - row["simulated_low"] for row in table}
    missed = [row["name"] for row in table if not row["simulated_low"] <= row["exact"] <= row["simulated_high"]]
    assert missed == [] and width["fixed"] < 0.5 * abs(next(r["exact"] for r in table if r["name"] == "fixed"))
    if minibatches == 1:  # tokens that are used again: what is outside has the sign that pushed it there
        own = {row["name"]: (row["own_low"], row["own_high"]) for row in table}
        assert own["sides"][0] > 0, "a lower bound raises entropy"


def test_what_a_batch_does_is_what_autograd_finds_for_its_loss() -> None:
    states = noise_states(make(reward="noise", start="rank", actions=30, samples=64, seeds=3, updates=4, lr=0.1), 4, 2)
    for name in ("clip_higher", "bapo", "m2po", "kl_cov"):
        found = torch.zeros(len(states.log_pi), dtype=torch.float64)
        for i, log_q in enumerate(states.log_pi):
            logits, batch = log_q.clone().requires_grad_(), states.batches
            log_pi, actions = logits.log_softmax(-1), batch.actions[i, 0]
            given = (log_pi[actions, None], batch.old[i, 0, :, None], batch.advantages[i, 0, :, None])
            loss = bandpo.policy_loss(*given, clip=name, metrics=False).loss
            (gradient,) = torch.autograd.grad(-loss, logits, retain_graph=True)
            (slope,) = torch.autograd.grad(-(log_pi.exp() * log_pi).sum(), logits)
            found[i] = slope @ gradient
        drift, moved = batch_drift(bandpo.get_clip(name), states)
        torch.testing.assert_close(drift, found.view(-1, 3).mean(0), rtol=1e-9, atol=1e-12)
        assert drift.abs().min() > 1e-5, name
        if name in SINGLE:
            torch.testing.assert_close(torch.stack([drift, moved]), exact_drift(bandpo.get_clip(name), states)[0][2:])


WRONG_SUMS: list[tuple[Callable[[Tensor, Tensor], object], str]] = [
    (lambda p, q: entropy_drift("bapo", p, q, torch.ones(2)), "clip 'bapo' looks at the whole batch"),
    (lambda p, q: entropy_drift("fixd", p, q, torch.ones(2)), "did you mean 'fixed'?"),
    (lambda p, q: entropy_drift("fixed", p, q[:1], torch.ones(2)), "log_pi_old has shape (2, 4), log_pi (1, 4)"),
    (lambda p, q: entropy_drift("fixed", p, q, torch.ones(3, 2)), "advantages has shape (3, 2): must broadcast"),
    (lambda p, q: entropy_drift("fixed", p, q, torch.ones(2), torch.ones(4, 2)), "shares must be at least 0 and sum"),
    (lambda p, q: entropy_drift("topr", p, q, torch.ones(2)), "clip 'topr' needs rewards"),
    (lambda p, q: drift_table(make()), "needs reward 'noise', positions 1"),
]


@pytest.mark.parametrize(("call", "said"), WRONG_SUMS)
def test_what_has_no_sum_is_refused_in_one_line(call: Callable[[Tensor, Tensor], object], said: str) -> None:
    with pytest.raises(InputError) as error:
        call(*policies(2, 4))
    assert said in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the simulation


def plain_training(setting: Setting, clip: bandpo.Clip, seed: int) -> list[float]:
    """The same run by autograd, torch.optim and `policy_loss`, one sequence and one seed at a time: its entropies."""
    generator = torch.Generator().manual_seed(seed)
    length, actions = setting.positions, setting.actions
    logits = start_logps(setting).repeat(length, 1).requires_grad_()
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.SGD
    optimizer = kind([logits], lr=setting.lr, **({"betas": setting.betas} if setting.optimizer == "adam" else {}))
    policies, entropies = [logits.detach().clone()], []
    for step in range(setting.rollouts):
        old = policies[max(0, step - setting.staleness)].log_softmax(-1)
        uniform = torch.rand(length + 1, setting.samples, generator=generator, dtype=torch.float64)
        sums = old.exp().cumsum(-1)
        taken = torch.tensor(
            [[min(int((sums[i] <= float(u) * sums[i, -1]).sum()), actions - 1) for i, u in enumerate(column)]
             for column in uniform[:length].T]
        )  # fmt: skip
        pays = [1.0] * setting.good + [setting.decent_reward] + [0.0] * actions
        rewards = [min(pays[a] for a in row) for row in taken.tolist()]
        if setting.reward == "noise":
            rewards = [float(u >= 0.5) for u in uniform[length]]
        A: list[float] = []
        size = setting.group or setting.samples
        for i in range(0, setting.samples, size):
            part = rewards[i : i + size]
            spread = np.std(part, ddof=1)
            A += [(x - np.mean(part)) / (spread + 1e-4) if spread > 0 else 0.0 for x in part]
        old_logps = torch.stack([old[i, taken[:, i]] for i in range(length)], 1)
        each = setting.samples // setting.minibatches
        for update in range(setting.updates):
            rows = slice(update % setting.minibatches * each, (update % setting.minibatches + 1) * each)
            log_pi = logits.log_softmax(-1)
            logps = torch.stack([log_pi[i, taken[rows, i]] for i in range(length)], 1)
            more = {"rewards": torch.tensor(rewards, dtype=torch.float64)[rows]} if "rewards" in clip.needs else {}
            if "entropies" in clip.needs:
                more["entropies"] = (-(old.exp() * old).sum(-1)).expand(each, length)
            advantages = torch.tensor(A, dtype=torch.float64)[rows]
            out = bandpo.policy_loss(logps, old_logps[rows], advantages, clip=clip, metrics=False, **more)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        policies.append(logits.detach().clone())
        log_pi = policies[-1].log_softmax(-1)
        entropies.append(float(-(log_pi.exp() * log_pi).sum(-1).mean()))
    return entropies


RUNS = [
    ("fixed", {}),
    ("band", {"reward": "noise", "start": "rank", "staleness": 2, "minibatches": 4, "group": 4, "rollouts": 5}),
    ("gspo", {"positions": 3, "minibatches": 2}),
    ("archer", {"positions": 3}),
    ("topr", {"reward": "several", "good": 2, "positions": 2, "optimizer": "sgd", "lr": 2.0}),
    ("m2po", {"positions": 2, "lr": 0.3}),
    ("bapo", {"minibatches": 2, "lr": 0.3}),
]


@pytest.mark.parametrize(("clip", "given"), RUNS)
def test_a_run_is_what_a_plain_training_loop_does(clip: str, given: dict[str, Any]) -> None:
    setting, made = make(**given), bandpo.get_clip(clip)
    trace = simulate(setting, made)
    for seed in range(setting.seeds):
        assert trace.entropy[seed, 1:].tolist() == pytest.approx(plain_training(setting, made, seed), abs=1e-9)
    if clip != "topr":
        assert int(trace.zero.sum()) > 0, "the clip acted"


@pytest.mark.parametrize(("clip", "given"), RUNS)
def test_a_seed_alone_is_the_seed_in_a_batch(clip: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    setting, made = make(**given), bandpo.get_clip(clip)
    whole = simulate(setting, made)
    alone = [simulate(make(**given, seeds=1, first_seed=seed), made) for seed in range(setting.seeds)]
    monkeypatch.setattr(bandit, "CACHED", 1)  # every seed a lot of its own
    lots = simulate(setting, made)
    for other in (Trace.join(alone), lots):
        for name in ("entropy", "good", "tail", "kl", "tv", "kl_old", "zero", "active", "kept", "free"):
            torch.testing.assert_close(getattr(whole, name), getattr(other, name), rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.stats.sums, other.stats.sums, rtol=1e-9, atol=1e-9)


def test_arms_share_their_noise() -> None:
    setting = make(reward="noise", actions=40, start="rank", lr=0.01, rollouts=4)
    free, wide = (simulate(setting, clip) for clip in (bandpo.get_clip("none"), bandpo.Fixed(1.0, 100.0)))
    assert torch.equal(free.entropy, wide.entropy) and free.entropy[:, -1].std() > 0
    tight = simulate(setting, bandpo.Fixed(0.01, 0.01))
    difference, apart = (tight.entropy - free.entropy)[:, 1], tight.entropy[:, 1] - free.entropy[:, 1].roll(1)
    assert difference.std() < apart.std()


def test_a_clip_sees_what_it_must_see() -> None:
    log_old, log_pi = (x.view(2, 3, 5) for x in policies(6, 5))
    actions = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    shape, rewards = actions.shape, torch.arange(24.0, dtype=torch.float64).view(2, 3, 4)
    batch = Rollout(actions, log_old.gather(2, actions), torch.ones(shape, dtype=torch.float64), rewards, log_old)
    tokens = next(iter(look(bandpo.get_clip("dppo_topk"), batch, log_pi)))
    kl = (log_old.exp() * (log_old - log_pi)).sum(-1)
    torch.testing.assert_close(tokens.state_divergence, kl[..., None].expand(shape))
    rows = next(iter(look(bandpo.get_clip("archer"), batch, log_pi)))
    assert rows.log_p.shape == (8, 3)
    torch.testing.assert_close(rows.log_p[5], torch.stack([log_old[1, i, actions[1, i, 1]] for i in range(3)]))
    torch.testing.assert_close(rows.entropies[5], -(log_old[1].exp() * log_old[1]).sum(-1))
    assert [t.log_p.shape for t in look(bandpo.get_clip("kl_cov"), batch, log_pi)] == [(4, 3)] * 2


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_optimizer_is_torchs(kind: str) -> None:
    x = torch.zeros(3, 4, dtype=torch.float64)
    theirs = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    ours = Optimizer(kind, 0.1, (0.8, 0.95))
    options: dict[str, Any] = {"betas": (0.8, 0.95)} if kind == "adam" else {}
    them = (torch.optim.Adam if kind == "adam" else torch.optim.SGD)([theirs], lr=0.1, maximize=True, **options)
    for i in range(5):
        gradient = torch.sin(torch.arange(12.0, dtype=torch.float64) * (i + 1)).view(3, 4)
        ours.step(x, gradient)
        theirs.grad = gradient.clone()
        them.step()
    torch.testing.assert_close(x, theirs.detach(), rtol=1e-13, atol=1e-15)


def test_starts_and_advantages() -> None:
    p = start_logps(make(reward="several", good=2, actions=6, good_p=0.01, decent_p=0.2, start="rank")).exp()
    assert p.tolist() == pytest.approx([0.01, 0.01, 0.2, *(0.78 * x / (1 + 1 / 2 + 1 / 3) for x in (1, 1 / 2, 1 / 3))])
    assert start_logps(make(reward="noise", actions=4)).exp().tolist() == pytest.approx([0.25] * 4)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.3, 0.3, 0.3]], dtype=torch.float64)
    spread = math.sqrt(1 / 3)
    want = [(2 / 3) / (spread + 1e-4), *[(-1 / 3) / (spread + 1e-4)] * 2, 0.0, 0.0, 0.0]
    assert bandit.standardise(rewards, 3)[0].tolist() == pytest.approx(want)


# ---------------------------------------------------------------- outcomes


def test_intervals_are_the_textbooks() -> None:
    hit = torch.tensor([1] * 3 + [0] * 17)
    theirs = stats.binomtest(3, 20).proportion_ci(0.95, "wilson")
    assert [wilson(hit)[x] for x in ("low", "high")] == pytest.approx([theirs.low, theirs.high])
    assert wilson(hit * 0)["low"] == 0 and wilson(hit * 0 + 1)["high"] == 1
    x = torch.tensor([0.3, 1.2, -0.4, 2.2, math.nan], dtype=torch.float64)
    for level in (0.95, 0.99):
        low, high = stats.ttest_1samp(x[:4].numpy(), 0).confidence_interval(level)
        assert [mean(x, level)[k] for k in ("value", "low", "high")] == pytest.approx([0.825, low, high])
    assert math.isnan(mean(x[:1])["low"])
    times = torch.tensor([float(i) for i in range(1, 21)])
    assert median(times) == {"value": 10.5, "low": 6.0, "high": 15.0}  # the 6th and 15th of 20: the textbook table
    beyond = median(torch.tensor([3.0, 5.0] + [math.inf] * 4))
    assert math.isnan(beyond["value"]) and beyond["low"] == 3.0 and math.isnan(beyond["high"])


def test_outcomes_of_a_known_trace() -> None:
    setting = make(rollouts=2, seeds=2)
    trace = simulate(setting, bandpo.get_clip("none"))
    trace.good = torch.tensor([[0.0, 0.6, 0.1], [0.0, 0.2, 0.5]])
    assert first_times(trace.good).tolist() == [1.0, math.inf]
    other = simulate(setting, bandpo.get_clip("fixed"))
    other.good = torch.zeros(2, 3)
    found = outcomes(setting, trace, other)
    assert found["found"]["count"] == 1 and found["curves"]["found"]["value"] == [0.0, 0.5, 0.5]
    assert found["less_reference"]["found"]["value"] == 0.5 and found["gradient_kept"]["value"] == 1.0
    difference = (trace.entropy - other.entropy)[:, -1].mean()
    assert found["less_reference"]["entropy_end"]["value"] == pytest.approx(float(difference))
    assert outcomes(setting, other, other)["less_reference"] == {}
    share = other.zero.sum(1) / other.active.sum(1)
    assert outcomes(setting, other, other)["zero_gradient"]["value"] == pytest.approx(float(share.mean()))
    assert sum(x["share"] for x in found["buckets"].values()) == pytest.approx(1.0)


def test_the_effects_that_it_is_there_to_show() -> None:
    """The positive controls, on few seeds: shape finds a rare action; each side of a clip has its sign."""
    rare = {**BUILT_IN["settings"]["rare"], "seeds": 48, "first_seed": 7, "rollouts": 16}
    rare["contrasts"] = [["band_tv", "fixed"]]
    noise = {**BUILT_IN["settings"]["noise"], "seeds": 48, "first_seed": 7}
    noise["contrasts"] = [["only_lower", "none"], ["only_upper", "none"]]
    result = run_study(read_study({"settings": {"rare": rare, "noise": noise}}))["settings"]
    assert result["rare"]["contrasts"][0]["found"]["low"] > 0.2
    lower, upper = (row["entropy_end"] for row in result["noise"]["contrasts"])
    assert lower["low"] > 0 > upper["high"]
    own = {row["name"]: row for row in result["noise"]["drift"]}
    assert own["only_lower"]["own_low"] > 0 > own["only_upper"]["own_high"]
    assert own["only_upper"]["exact"] > own["only_upper"]["own"], "fresh samples do not know what moved the policy"


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["bandit", *words])
    return code, *capsys.readouterr()


SMALL = """
question: 'Which <b> arm?'
settings:
  rare:
    reward: rare
    actions: 20
    good_p: 0.02
    rollouts: 4
    samples: 32
    arms:
      none: {clip: none}
      tight: {clip: fixed, clip_args: {eps_low: 0.1, eps_high: 0.1}, group: two words}
    contrasts: [[tight, none]]
  coin:
    reward: noise
    actions: 20
    rollouts: 3
    lr: 5e-2
    arms: {fixed: {clip: fixed}, seq: {clip: gspo}, band: {clip: band, clip_args: {delta: 0.01}}}
"""


def test_the_command_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, page, sheet = tmp_path / "s.yaml", tmp_path / "page.html", tmp_path / "drift.csv"
    file.write_text(SMALL)
    code, out, err = run(capsys, str(file), "--seeds", "5", "--html", str(page), "--csv", str(sheet), "--json")
    result, html = json.loads(out), page.read_text("utf-8")
    assert code == 0 and result["html"] == str(page) and "rare: tight" in err and "coin: drift" in err
    assert result["command"] == f"bandpo bandit {file} --seeds 5 --csv {sheet} --html {page} --json"
    assert result["command"] in html
    shown = re.sub(r"<[^>]+>", " ", html)
    settings = result["settings"]
    assert [x["facts"]["seeds"] for x in settings.values()] == [5, 5] and settings["rare"]["reference"] == "none"
    for setting in settings.values():
        for name, arm in setting["arms"].items():
            keys = ("entropy_end", "tail_end", "kl_first", "zero_gradient", "gradient_kept")
            for key in (*keys, *(["found"] if "found" in arm else ["entropy_per_tv", "tv", "kl"])):
                assert f"{arm[key]['value']:.3f}" in shown, (name, key)
                assert f"{arm[key]['low']:.3f}" in shown and f"{arm[key]['high']:.3f}" in shown, (name, key)
    drift = settings["coin"]["drift"]
    assert {row["name"] for row in drift if row["exact"] is None} == set(bandpo.list_clips()) - set(SINGLE)
    for row in drift:
        for kind in ("exact", "simulated", "own"):
            assert row[kind] is None or f"{row[kind]:+.4f}" in shown, row["name"]
    lines = list(csv.DictReader(sheet.read_text("utf-8").splitlines()))
    assert [(x["setting"], x["name"]) for x in lines] == [("coin", row["name"]) for row in drift]
    for line, row in zip(lines, drift, strict=True):
        assert line["clip"] == row["clip"] and json.loads(line["clip_args"] or "{}") == row["clip_args"]
        for key in ("exact", "simulated_low", "own", "own_high"):
            assert line[key] == ("" if row[key] is None else f"{row[key]:.6g}"), row["name"]
    assert f"{settings['rare']['contrasts'][0]['gradient_kept']['value']:+.3f}" in shown
    assert "Which &lt;b&gt; arm?" in html and html.count("<svg") == 2 + 2 + 1 + 2 - 2 and "two words" in html
    for outside in ("http:", "https:", "src=", "@import"):
        assert outside not in html.replace("http://www.w3.org/1999/xlink", "")


def test_the_command_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--seeds", "3")
    assert code == 0 and "rare: 200 actions" in out and "band_tv" in out and "hold the sum in" in out
    assert out == run(capsys, "--seeds", "3")[1], "the same seeds give the same numbers"
    code, out, _ = run(capsys, "--seeds", "1", "--setting", "rare", "--json")
    one = json.loads(out)["settings"]
    assert code == 0 and list(one) == ["rare"] and one["rare"]["arms"]["fixed"]["entropy_end"]["low"] is None


def test_the_committed_study_is_whole() -> None:
    study = read_study(read_yaml(STUDY.read_text("utf-8"), STUDY.name))
    assert study.question and study.outcomes and study.analysis
    arms = {name: {arm.name for arm in setting.arms} for name, setting in study.settings.items()}
    asked = {"none", "fixed", "clip_higher", "only_lower", "only_upper", "band_kl", "band_tv", "band_chi2", "sides"}
    for name, setting in study.settings.items():
        assert setting.seeds >= 200 and setting.contrasts and asked <= arms[name]
    assert "fixed_04" in arms["rare"], "a fixed clip as loose as Band"


def changed(text: str, new: str) -> str:
    assert text in SMALL
    return SMALL.replace(text, new, 1)


WRONG = [
    (changed("settings:", "setings:"), "s.yaml has no key 'setings' (did you mean 'settings'?)"),
    ("question: x", "settings is NoneType: must be a mapping"),
    ("- a\n- b", "s.yaml is list: must be a mapping"),
    ("settings: {}", "settings is empty"),
    ("settings: {a: [", "not valid YAML: line 1"),
    (changed("reward: rare", "reward: rar"), "rare.reward='rar': must be one of rare, several, noise (did you mean"),
    (changed("reward: rare\n", "\n"), "s.yaml: rare has no reward"),
    (changed("samples: 32", "sample: 32"), "s.yaml: rare has no key 'sample' (did you mean 'samples'?)"),
    (changed("samples: 32", "samples: 1"), "rare.samples=1: must be a whole number from 2"),
    (changed("samples: 32", "samples: 3.5"), "rare.samples=3.5: must be a whole number"),
    (changed("samples: 32", "minibatches: 7"), "rare.minibatches=7: must divide samples=256"),
    (changed("samples: 32", "minibatches: 32"), "rare.updates=16: must be a multiple of minibatches=32"),
    (changed("samples: 32", "group: 100"), "rare.group=100: must divide samples=256"),
    (changed("rollouts: 4", "rollouts: yes"), "rare.rollouts='yes': must be a whole number from 1"),
    (changed("rollouts: 4", "staleness: -1"), "rare.staleness=-1: must be a whole number from 0"),
    (changed("rollouts: 4", "lr: 0"), "rare.lr=0: must be a finite number greater than 0"),
    (changed("rollouts: 4", "betas: 0.9"), "rare.betas=0.9: must be two numbers"),
    (changed("rollouts: 4", "betas: [0.9, 1]"), "rare.betas[1]=1: must be a finite number"),
    (changed("rollouts: 4", "optimizer: adm"), "did you mean 'adam'?"),
    (changed("rollouts: 4", "dtype: float16"), "rare.dtype='float16': must be one of float32, float64"),
    (changed("good_p: 0.02", "good_p: 0.8"), "good * good_p + decent_p is 1.1: must be below 1"),
    (changed("good_p: 0.02", "good: 2"), "rare.good=2: must be 1 with reward 'rare'; take reward 'several'"),
    (changed("actions: 20", "actions: 2"), "rare.actions=2: must be at least 3"),
    (changed("reward: noise", "reward: noise\n    good_p: 0.1"), "coin.good_p: means nothing with reward 'noise'"),
    (changed("reward: rare", "reward: several"), "rare.good=1: must be at least 2 with reward 'several'"),
    (changed("reward: rare", "reward: rare\n    reference: non"), "did you mean 'none'?"),
    (changed("[[tight, none]]", "[[tight]]"), "rare.contrasts=[['tight']]: must be a list of pairs"),
    (changed("[[tight, none]]", "[[tight, tight]]"), "'tight' is compared with itself"),
    (changed("{clip: none}", "{clip: nine}"), "rare.arms.none: clip='nine': must be one of none"),
    (changed("{clip: none}", "none"), "rare.arms.none is str: must be a mapping"),
    (changed("{clip: none}", "{}"), "rare.arms.none.clip=None: must be a clip's name"),
    (changed("eps_low: 0.1", "eps_lo: 0.1"), "clip 'fixed' has no argument 'eps_lo' (did you mean 'eps_low'?)"),
    (changed("eps_low: 0.1", "eps_low: 2"), "rare.arms.tight: eps_low=2"),
    (changed("group: two words", "group: 3"), "rare.arms.tight.group=3: must be text"),
    (changed("arms: {fixed: {clip: fixed}, ", "x: {fixed: {clip: fixed}, "), "coin has no key 'x'"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_file_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(text)
    code, out, err = run(capsys, "s.yaml", "--html", "page.html")
    assert (code, out) == (2, "") and said in err and err.startswith("bandpo: s.yaml") and err.count("\n") == 1
    assert not Path("page.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("no.yaml", "no.yaml: cannot be read"),
        ("--seeds 0", "--seeds=0: must be a whole number from 1"),
        ("--seeds x", "invalid int value: 'x'"),
        ("--setting rar", "--setting rar: must be one of rare, noise (did you mean 'rare'?)"),
        ("--html no/such/page.html", "--html no/such/page.html: must be a file in a folder that exists"),
        ("--html .", "--html .: must be a file"),
        ("--csv no/such/drift.csv", "--csv no/such/drift.csv: must be a file in a folder that exists"),
        ("--setting rare --csv drift.csv", "--csv drift.csv: no setting has a drift of entropy; needs reward 'noise'"),
        ("--sets 3", "--sets: bandpo bandit does not take it"),
    ],
)
def test_wrong_words_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words.split())
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_what_is_missing_is_said_before_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, err = run(capsys)
    assert code == 2 and err.endswith("pip install scipy\n") and err.count("\n") == 1


# ---------------------------------------------------------------- its page of the docs

PAGE = (ROOT / "docs" / "bandit.md").read_text("utf-8")


def test_the_pages_example_prints_what_is_shown() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE, flags=re.M | re.S)
    assert len(blocks) == PAGE.count("```python") == 1
    for code, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "bandit.md", "exec"), {})
        assert out.getvalue() == shown


def test_the_pages_commands_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "docs/data").mkdir(parents=True)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    monkeypatch.chdir(tmp_path)
    whole = bandit_config.choose

    def short(*args: Any) -> Any:
        study = whole(*args)
        settings = {name: dataclasses.replace(x, seeds=2, rollouts=2) for name, x in study.settings.items()}
        return dataclasses.replace(study, settings=settings)

    monkeypatch.setattr(bandit_config, "choose", short)
    lines = [x for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S) for x in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, command, *words = line.split()
        assert (program, command) == ("bandpo", "bandit")
        code, out, _ = run(capsys, *words)
        assert code == 0 and out, line
    assert Path("bandit.html").is_file()
    drawn, kept = (folder / "docs/data/bandit-entropy.csv" for folder in (tmp_path, ROOT))
    names = [sorted(line.split(",")[:2] for line in x.read_text("utf-8").splitlines()) for x in (drawn, kept)]
    assert names[0] == names[1], "the table has the clips of today"
    (mine,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)
    Path("mine.yaml").write_text(mine)
    assert run(capsys, "mine.yaml")[0] == 0
    keys = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|[^|]*\| .*\|$", PAGE, flags=re.M))))
    assert keys == {f.name for f in dataclasses.fields(Setting)} - {"name", "question"}


def test_the_pages_counts_are_those_of_its_study() -> None:
    setting = read_study(read_yaml(STUDY.read_text("utf-8"), STUDY.name)).settings["rare"]
    for arm, said in (("fixed", "fixed .2/.2"), ("band_tv", "Band tv .05")):
        clip = next(x.clip for x in setting.arms if x.name == arm)
        hit = wilson(first_times(simulate(setting, clip).good) < math.inf)
        found = re.search(rf"^\| {re.escape(said)} \| (\d+)/200 \[\.(\d+), \.(\d+)\]", PAGE, flags=re.M)
        assert found and abs(hit["count"] - int(found[1])) <= 4, "rounding differs between machines"
        theirs = stats.binomtest(int(found[1]), 200).proportion_ci(0.95, "wilson")
        assert [float(f"0.{found[i]}") for i in (2, 3)] == pytest.approx([theirs.low, theirs.high], abs=6e-4)


def test_the_table_of_entropy_is_what_the_sum_gives() -> None:
    table = list(csv.DictReader((ROOT / "docs/data/bandit-entropy.csv").read_text("utf-8").splitlines()))
    study = read_study(read_yaml(STUDY.read_text("utf-8"), STUDY.name))
    for name in ("noise", "noise_once"):
        states = noise_states(study.settings[name], 2, 2)
        without = batch_drift(bandpo.get_clip("none"), states)[0]
        for row in table:
            if row["setting"] == name and row["name"] in ("only_lower", "only_upper", "fixed", "band_tv"):
                clip = bandpo.get_clip(row["clip"], **json.loads(row["clip_args"] or "{}"))
                fresh, moved, own, own_moved = exact_drift(clip, states)[0]
                values = (*ratio(fresh, moved), *ratio(own - without, own_moved))
                said = [float(row[f"{kind}{end}"]) for kind in ("exact", "own") for end in ("", "_low", "_high")]
                assert said == pytest.approx(values, rel=1e-3, abs=1e-5), row["name"]
                shown = " ".join(PAGE.split()).replace("\N{MINUS SIGN}", "-")
                if name == "noise" and row["name"] != "band_tv":
                    assert "{:+.3f} [{:+.3f}, {:+.3f}]".format(*said[3:]).replace("0.", ".") in shown, row["name"]
    sums = [row for row in table if row["exact"]]
    held = sum(float(row["simulated_low"]) <= float(row["exact"]) <= float(row["simulated_high"]) for row in sums)
    assert held == len(sums) == 90 and len(table) == 98


def test_the_pictures_are_what_their_command_draws(tmp_path: Path) -> None:
    draw = runpy.run_path(str(ROOT / "docs/draw_bandit.py"))
    draw["main"](tmp_path)
    for name in draw["PICTURES"]:
        drawn, kept = ((folder / f"{name}.svg").read_text("utf-8") for folder in (tmp_path, ROOT / "docs/img"))
        assert drawn.count("<path") == kept.count("<path") > 50 and f"(img/{name}.svg#only-" in PAGE
    assert "does not act here: 18 clips" in kept
