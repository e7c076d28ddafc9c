"""Long runs and many tokens: a run that leaks is noticed, one that does not is flat; counts do not end at 2^31."""

from __future__ import annotations

import json
import os
import re
import runpy
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import bandpo
from bandpo._input import InputError
from bandpo.analysis.explain import Explainer
from bandpo.analysis.tails import Tails
from bandpo.loss import fused

ROOT = Path(__file__).parent.parent
SMALL = (
    "--steps_per_generation 2 --num_generations 4 --per_device_train_batch_size 8 --save_steps 10 --eval_every 0 "
    "--eval_prompts 4 --eval_samples 1"
)
LEAKS: list[Any] = []


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks" / "soak.py"))


def leak(recorder: Any, *given: Any, **named: Any) -> None:
    """A callback that keeps something of everything at each step."""
    path = recorder.session.folder.path / f"left-{len(LEAKS)}.txt"
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    LEAKS.append((b"x" * (4 << 20), path.open("w"), thread))


def watched(soak: dict[str, Any], folder: Path, patch: Callable[[], None]) -> dict[str, bool]:
    """Train 100 steps in a process of its own, whose memory nothing else uses; what of it was flat."""
    import bandpo.lab.trl.run  # noqa: F401

    child = os.fork()
    if child == 0:
        try:
            patch()
            with redirect_stderr(StringIO()):
                rows = soak["judge"](soak["soak"](100, 2, folder / "run", SMALL))
            (folder / "rows.json").write_text(json.dumps(rows))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    rows = json.loads((folder / "rows.json").read_text())
    return {row["what"]: row["flat"] for row in rows if row["what"] not in ("bytes", "seconds")}  # too short for these


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process holds is read from Linux's /proc")
def test_a_run_is_flat_and_one_that_leaks_is_not(
    soak: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaks").mkdir()
    names = {"memory", "descriptors", "threads", "files"}
    assert watched(soak, tmp_path, lambda: None) == dict.fromkeys(names, True)
    from bandpo.lab.trl.callbacks import Recorder

    leaks = watched(soak, tmp_path / "leaks", lambda: monkeypatch.setattr(Recorder, "on_step_end", leak))
    assert leaks == dict.fromkeys(names, False)


def test_growth_is_that_of_a_line_whose_slope_is_known(soak: dict[str, Any]) -> None:
    """By hand: 1000 + 2 a step, and a wave that averages out; the mean of the last three quarters is 3510."""
    noise = [(-1) ** i * 300.0 for i in range(200)]
    seen = [{"step": 10.0 * (i + 1), "memory": 1000 + 20.0 * (i + 1) + noise[i]} for i in range(200)]
    means, grown, half = soak["growth"](seen, "memory")
    assert len(means) == 10 and grown == pytest.approx(2 * 2000 / 3510, rel=0.02) and 0 < half < 0.05 * grown
    assert soak["growth"]([{"step": float(i), "memory": 7.0} for i in range(40)], "memory")[1:] == (0.0, 0.0)


def test_tails_count_beyond_two_to_the_thirty_one() -> None:
    one, many = Tails(), Tails()
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    one.add(values)
    many.add(values)
    many.counts *= 2**40
    for share in (0.0, 0.001, 0.5, 0.999, 1.0):
        assert many.quantile(share) == one.quantile(share)
    threshold, found = one.threshold(100)
    assert many.threshold(100 * 2**40) == (threshold, found * 2**40)


def test_explain_holds_its_sample_and_no_part_that_it_is_from() -> None:
    """A million tokens in parts: a view of a few rows would hold the memory of all."""
    explainer, old = Explainer("fixed", others=False), -torch.rand(1 << 15)
    for _ in range(32):
        explainer.update(old - 0.1, old, torch.ones_like(old))
    kept = explainer.reached.kept
    assert 5_000 < sum(len(x) for x in kept) <= 20_000
    held = sum(x.untyped_storage().nbytes() for x in kept)
    assert held <= 2 * sum(x.nbytes for x in kept)


def test_the_kernels_places_fit_into_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fused._policy()
    if policy is None:
        pytest.skip("Triton does not import")
    last = fused.MOST_TOKENS + policy.MOST_STEPS * max(policy.BLOCK, policy.STATS_BLOCK)  # of the last program
    assert last < 2**31
    monkeypatch.setenv("BANDPO_KERNEL", "triton")
    many = torch.zeros(1).expand(2**31)  # takes no memory
    given = {"logps": many, "old_logps": many, "advantages": many, "mask": None}
    with pytest.raises(InputError, match=f"{2**31} tokens are more than {fused.MOST_TOKENS}"):
        fused.choose(bandpo.Fixed(), given)


# ---------------------------------------------------------------- the page

PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")


def table(mark: str) -> list[list[str]]:
    (text,) = re.findall(rf"<!-- {mark} -->\n\n\|.*\n\|[-|]*\n((?:\|.*\n)+)", PAGE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    return rows


def test_the_page_says_what_the_soak_found() -> None:
    for row, (_, last, grown, allowed) in zip(results("soak"), table("soak"), strict=True):
        assert row["flat"] and row["steps"] == 2000
        unit = 1e6 if last.endswith("MB") else 1.0
        assert float(last.split()[0]) == pytest.approx(row["means"][-1] / unit, rel=5e-3)
        shown = [float(x) / 100 for x in re.findall(r"[-+]?[\d.]+", grown)]
        want = [row["grown"], row["low"], row["high"]] if len(shown) == 3 else [row["grown"]]
        assert shown == pytest.approx(want, abs=6e-4) and float(allowed.split()[0]) / 100 == row["allowed"]


def test_the_page_says_what_the_scale_was() -> None:
    rows, shown = results("scale"), table("scale")
    assert len(rows) == 3 * len(shown) and [x["tokens"] for x in rows] == 5 * [2**22, 2**24, 2**26]
    for i, (what, *cells) in enumerate(shown):
        three = rows[3 * i : 3 * i + 3]
        assert three[0]["what"] in what
        wanted = [f"{x['nanoseconds_a_token']:,.0f}" for x in three]
        assert cells == wanted + [f"{x['bytes_at_most'] / 1e6:,.0f} MB" for x in three]
        spread = three[2]["nanoseconds_a_token"] / three[0]["nanoseconds_a_token"]
        assert 0.9 <= round(spread, 1) <= 1.6
