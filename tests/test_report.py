"""The report: every number of a run reaches the page, nothing is fetched, and no state of the folder crashes it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bandpo._input import InputError
from bandpo.lab.report import figures
from bandpo.lab.report.page import write_report
from bandpo.lab.report.runs import clip_label, read_run, read_runs, with_arms
from bandpo.lab.run.records import Facts, Step
from bandpo.loss.stats import BUCKETS

BAND = {"divergence": "kl", "delta": 0.05, "cap": 10.0}


def make_run(
    folder: Path, clip: str = "band", clip_args: dict | None = None, seed: int = 0, rollouts: int = 24
) -> Path:
    """Write a run folder as `bandpo train` leaves it, four updates a rollout."""
    folder.mkdir(parents=True)
    records: list[dict] = []
    for step in range(1, 4 * rollouts + 1):
        record = {"event": "step", "step": step, "rollout": (step - 1) // 4 + 1, "seconds": 0.1 * step}
        record |= {"reward": step / 100, "entropy": 1 / step, "clipped": 0.05, "loss": 0.1, "grad_norm": 1.0}
        record |= {"clip/zero_grad_above": 0.03, "clip/zero_grad_below": 0.02}
        for i, bucket in enumerate(BUCKETS):
            record |= {f"clip/share/{bucket}": 0.2, f"clip/zero_grad_above/{bucket}": i / 100}
            record |= {f"clip/zero_grad_below/{bucket}": 0.01}
        records.append(record)
    records.append(
        {"event": "eval", "step": 40, "accuracy": 0.612, "low": 0.55, "high": 0.67, "entropy": 0.5, "n": 256}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    before = {"accuracy": 0.2912, "low": 0.264, "high": 0.32, "entropy": 0.84, "n": 1024}
    after = {"accuracy": 0.9084, "low": 0.889, "high": 0.925, "entropy": 0.14, "n": 1024}
    info = {"command": f"bandpo train demo --seed {seed} --out 'a b'", "versions": {"torch": "2.13.0"}, "seed": seed}
    info |= {
        "machine": {"cpu": "x86"},
        "commit": "abc1234",
        "status": "done",
        "clip": clip,
        "clip_args": clip_args or {},
    }
    info |= {"task": "addition", "model": "tiny", "before": before, "after": after, "seconds": 151.0, "recipe": "demo"}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "recipe.yaml").write_text("task: addition\nlearning_rate: 0.0003\n")
    sample = {
        "prompt": "1+1=",
        "answer": "2",
        "before": "3",
        "after": "2",
        "correct_before": False,
        "correct_after": True,
    }
    (folder / "samples.json").write_text(json.dumps([sample]))
    old = np.log(np.array([0.5, 0.5, 0.5, 0.5, 0.08], dtype=np.float32))
    ratio = np.array([1.0, 1.5, 0.5, 1.5, 2.0], dtype=np.float32)  # in; above, A > 0; below, A < 0; above, A < 0; in
    advantages = np.array([1, 1, -1, -1, 1], dtype=np.float32)
    np.savez(folder / "tokens.npz", old_logps=old, logps=old + np.log(ratio), advantages=advantages)
    return folder


class Page(HTMLParser):
    """The text of a page, its elements, and every address in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "use", "path"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


def page_of(folders: list[Path], out: Path) -> Page:
    return Page(write_report(folders, out).read_text("utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Page:
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "a", "band", BAND)
    make_run(root / "a" / "arms" / "none", "none")
    make_run(root / "a" / "arms" / "fixed", "fixed", {"eps_low": 0.2, "eps_high": 0.28})
    return page_of(with_arms(root / "a"), root / "report.html")


def test_everything_measured_is_on_the_page(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path / "a", "band", BAND)], tmp_path / "r.html")
    for shown in ["29.1 %", "90.8 %", "26.4 to 32.0", "88.9 to 92.5", "1,024 completions", "0.84 → 0.14", "5.00 %"]:
        assert shown in page.text, shown
    for shown in ["band kl 0.05, cap 10", "seed 0", "24 rollouts, 96 optimiser steps", "2 min 31 s", "1+1=", "abc1234"]:
        assert shown in page.text, shown
    assert "bandpo train demo --seed 0 --out 'a b'" in page.text and "learning_rate: 0.0003" in page.text
    assert "5 tokens; zero gradient: 20.0 % above, 20.0 % below. Outside, but moving back: 20.0 %." in page.text
    assert "intervals of before and after do not overlap" in page.text
    assert page.tags.count("svg") == 8 and page.open == [], "six curves, region, buckets; every element closed"


def test_nothing_is_fetched(compared: Page) -> None:
    assert compared.addresses, "clip paths and the dots' bitmap at least"
    for address in compared.addresses:
        assert address.startswith(("#", "data:image/png;base64,")), address
    assert not {"link", "iframe", "img", "object", "embed"} & set(compared.tags)


def test_arms_are_side_by_side_and_no_winner_is_named(compared: Page) -> None:
    for name in ["band kl 0.05, cap 10", "no clip", "fixed 0.2 / 0.28"]:
        assert compared.text.count(name) >= 3, name
    assert "one seed only: a difference between such arms may be chance and proves nothing" in compared.text
    assert not re.search(r"\b(better|best|wins?|beats?|outperforms?)\b", compared.text, re.IGNORECASE)
    assert compared.tags.count("svg") == 10, "one region for each arm, one set of curves"


def test_equal_clips_are_told_apart_by_seed_then_folder(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, "none", seed=seed) for name, seed in [("a", 0), ("b", 1), ("c", 1)]]
    assert [r.name for r in read_runs(folders)] == ["no clip, seed 0", "no clip, seed 1, b", "no clip, seed 1, c"]
    text = page_of(folders, tmp_path / "r.html").text
    assert "Nothing here compares this clip with another one." in text


def test_runs_of_one_arm_share_colour_region_and_bars(tmp_path: Path) -> None:
    made = [("a", "band", BAND, 0), ("b", "none", None, 0), ("c", "band", BAND, 1), ("d", "none", None, 1)]
    folders = [make_run(tmp_path / name, clip, args, seed, rollouts=2) for name, clip, args, seed in made]
    assert [run.arm for run in read_runs(folders)] == [0, 1, 0, 1]
    assert [run.arm for run in read_runs([folders[0], folders[2]])] == [0, 1]
    page = page_of(folders, tmp_path / "r.html")
    assert "band kl 0.05, cap 10 (2 runs)" in page.text and "no clip (2 runs)" in page.text
    assert page.tags.count("svg") == 9 and "2 seeds an arm at least" in page.text


def test_text_from_a_run_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "band", BAND)
    bad = "</pre><script>alert(1)</script>&amp;\"'"
    sample = {k: bad for k in ("prompt", "answer", "before", "after")} | {
        "correct_before": True,
        "correct_after": False,
    }
    (folder / "samples.json").write_text(json.dumps([sample]))
    info = json.loads((folder / "run.json").read_text())
    info |= {"command": bad, "task": bad, "model": bad, "machine": {bad: bad}, "status": bad, "commit": bad}
    (folder / "run.json").write_text(json.dumps(info | {"clip_args": {**BAND, bad: bad}}))
    (folder / "recipe.yaml").write_text(bad)
    page = page_of([folder], tmp_path / "r.html")
    assert page.tags.count("script") == 1, "the page's own"
    assert page.text.count("<script>alert(1)</script>&amp;\"'") >= 9


FILES = ["metrics.jsonl", "recipe.yaml", "samples.json", "tokens.npz", "run.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_said_and_not_fatal(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    (folder / name).unlink()
    assert f"{name} is not there" in page_of([folder], tmp_path / "r.html").text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"\xff{ not this", b"[1, 2]\n[3]", b""])
def test_a_broken_file_is_said_and_not_fatal(tmp_path: Path, name: str, content: bytes) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    (folder / name).write_bytes(content)
    run = read_run(folder)
    write_report([folder], tmp_path / "r.html") if name == "run.json" else None
    harmless = name == "recipe.yaml" and content != b"\xff{ not this" or name == "metrics.jsonl" and content == b""
    assert [m.split()[0] for m in run.missing] == ([] if harmless else [name])


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"after": None, "status": "failed", "error": "loss is NaN"}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "step", "step": 3, "rollout": 1, "reward": math.nan, "clipped": None}) + "\n")
        file.write('{"event": "step", "st')
    run = read_run(folder)
    assert len(run.steps) == 8 and run.missing == [] and math.isnan(run.steps[2].reward), "the later record counts"
    text = page_of([folder], tmp_path / "r.html").text
    assert "This run has not ended; its status is failed: loss is NaN." in text and "→ –" in text


def test_a_run_json_of_other_types_is_survived(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    keys = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({key: ["odd", 1] for key in keys}))
    assert "odd" in page_of([folder], tmp_path / "r.html").text


def test_what_a_reader_would_not_see_is_shown_and_a_page_is_always_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    sample = {"prompt": "1+1=\ud800", "answer": "\x1b[31m2", "before": "a\x00b", "after": "\u202edcba"}
    (folder / "samples.json").write_text(json.dumps([sample]))
    page = page_of([folder], tmp_path / "r.html").text
    for shown in ("1+1=⟨U+D800⟩", "⟨U+001B⟩[31m2", "a⟨U+0000⟩b", "⟨U+202E⟩dcba"):
        assert shown in page, shown
    old = (tmp_path / "r.html").read_text("utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="cannot be written .No space left"):
        write_report([folder], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text("utf-8") == old and len(list(tmp_path.iterdir())) == 2


def test_what_leads_out_of_the_folder_or_would_fill_the_memory_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    (tmp_path / "secret").write_text("token: hunter2")
    (folder / "recipe.yaml").unlink()
    (folder / "recipe.yaml").symlink_to(tmp_path / "secret")
    zeros = np.zeros(300_000_000 // 8)
    np.savez_compressed(folder / "tokens.npz", old_logps=zeros, logps=zeros[:1], advantages=zeros[:1])
    assert (folder / "tokens.npz").stat().st_size < 1_000_000
    page = page_of([folder], tmp_path / "r.html").text
    assert "hunter2" not in page and "recipe.yaml cannot be read (it is no file of this folder)" in page
    assert "tokens.npz cannot be read (it unpacks to 300," in page


def test_a_fall_is_called_a_fall(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "band", BAND, rollouts=2)
    info = json.loads((folder / "run.json").read_text())
    for before, said in ((0.95, "Held-out accuracy went down"), (0.9084, "Held-out accuracy stayed the same")):
        score = {**info["before"], "accuracy": before}
        (folder / "run.json").write_text(json.dumps(info | {"before": score}))
        assert said in page_of([folder], tmp_path / "r.html").text


def test_an_unknown_clip_leaves_out_its_region_only(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path / "a", "from-the-future", {"x": 1}, rollouts=2)], tmp_path / "r.html")
    assert "This clip cannot be drawn here" in page.text and page.tags.count("svg") == 7


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", rollouts=2)
    for folders, said in [([], "at least one run"), ([tmp_path], "holds no run"), ([tmp_path / "x"], "no such folder"),
                          ([run, run], "given twice")]:  # fmt: skip
        with pytest.raises(InputError, match=said) as error:
            write_report(folders, tmp_path / "r.html")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot be written"):
        write_report([run], tmp_path / "none" / "r.html")


def test_bucket_rates_are_weighted_by_tokens(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", rollouts=2))
    rows = [
        {"clip/share/p0-0.01": 0.3, "clip/zero_grad_above/p0-0.01": 0.5, "clip/zero_grad_below/p0-0.01": 0.0},
        {"clip/share/p0-0.01": 0.1, "clip/zero_grad_above/p0-0.01": 0.1, "clip/zero_grad_below/p0-0.01": 0.4},
        {"clip/share/p0-0.01": 0.0, "clip/zero_grad_above/p0-0.01": 0.0, "clip/zero_grad_below/p0-0.01": 0.0},
        {"clip/share/p0-0.01": None, "clip/zero_grad_above/p0-0.01": "x"},
    ]
    run.steps[:] = [Step(step=i, **row) for i, row in enumerate(rows)]
    assert figures.bucket_rates([run], "p0-0.01") == pytest.approx((0.4, 0.1, 0.4 / 3))
    assert all(math.isnan(x) for x in figures.bucket_rates([run], "p0.9-1"))


def test_clip_labels() -> None:
    assert clip_label(Facts(clip="band")) == "band kl 0.05", "defaults are filled in"
    assert clip_label(Facts(clip="clip-higher")) == "clip-higher 0.2 / 0.28"
    assert clip_label(Facts(clip="none")) == "no clip" and clip_label(Facts()) == "unknown clip"
    assert clip_label(Facts(clip="gone.py:Mine", clip_args={"x": 0.5})) == "gone.py:Mine, x 0.5"
