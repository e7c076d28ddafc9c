"""The lessons run and print what they show, their notebooks are whole, and the RLHF example learns."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LESSONS: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "lessons.py"))
SCRIPTS = {script.stem: script for script in LESSONS["LESSONS"]}
TORCH_ALONE = ("101_operator", "102_your_loop")
PAGE = (ROOT / "docs" / "examples.md").read_text("utf-8")


@pytest.mark.parametrize("name", TORCH_ALONE)
def test_the_first_lessons_print_what_they_show(name: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, shown = "", 0
    for kind, text in LESSONS["cells"](SCRIPTS[name].read_text("utf-8")):
        if kind == "code":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, name, "exec"), names)
            printed = out.getvalue()
        elif text.startswith("```text\n"):
            shown += 1
            got, want = (re.findall(r"[\d.]+|[^\s\d]+", x) for x in (printed, text[8 : text.index("\n```")]))
            assert [x for x in got if not x[0].isdigit()] == [x for x in want if not x[0].isdigit()]
            numbers = [[float(x) for x in side if x[0].isdigit()] for side in (got, want)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)
    assert shown >= 3


def test_the_second_lesson_s_two_ways_are_one() -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        names = runpy.run_path(str(SCRIPTS["102_your_loop"]))
    assert names["by_advantages"] == pytest.approx(names["by_policy_loss"], rel=1e-9)
    assert sum(names["shares"]) > 0 == sum(names["shares"][::4])  # the clip acts, but never in a rollout's first update


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a lesson from the top folder; returns what it prints."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'bandpo[trl]'")
    monkeypatch.chdir(ROOT)

    def printed(name: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hosts
            runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        return capsys.readouterr().out

    return printed


def test_trl_s_lesson_learns_and_its_clip_acts(run: Callable[[str], str]) -> None:
    rows = re.findall(r"reward (\S+)  without gradient (\S+)%", run("103_trl"))
    rewards, clipped = ([float(x) for x in column] for column in zip(*rows, strict=True))
    assert len(rows) == 6 and rewards[-1] > rewards[0] + 0.1 and max(clipped) > 1


def test_the_task_s_lesson_trains(run: Callable[[str], str]) -> None:
    out = run("104_own_task")
    assert "{'prompt': '" in out and "held out before" in out


def test_the_report_s_lesson_reads_what_is_there(run: Callable[[str], str]) -> None:
    out = run("106_reading_a_report")
    assert re.search(r"^before  held-out accuracy 0\.\d+ \[.*\nafter   held-out", out, flags=re.M)
    assert len(re.findall(r"^rollout \d  reward", out, flags=re.M)) == 4
    shares = re.findall(r"^p\S+ +(\S+)% of tokens", out, flags=re.M)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5) and "What each clip would do" in out


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_notebook_has_the_script_s_cells(name: str, tmp_path: Path) -> None:
    LESSONS["main"](str(tmp_path))
    book = json.loads((tmp_path / f"{name}.ipynb").read_text("utf-8"))
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert ast.dump(ast.parse("\n".join(code))) == ast.dump(ast.parse(SCRIPTS[name].read_text("utf-8")))
    assert "".join(book["cells"][0]["source"]).startswith(f"# {name[:3]}: ") and book["nbformat"] == 4
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])


def test_jupytext_reads_the_same_cells() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    for script in SCRIPTS.values():
        read = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
        assert read == LESSONS["cells"](script.read_text("utf-8"))


def test_every_lesson_is_on_the_page_and_names_the_next() -> None:
    assert re.findall(r"\(examples/(\w+)\.md\)", PAGE) == list(SCRIPTS)
    for name, following in zip(list(SCRIPTS)[:-1], list(SCRIPTS)[1:], strict=True):
        assert f"# Next: [{following[:3]}]({following}.md)" in SCRIPTS[name].read_text("utf-8")
    for link in re.findall(r"\]\((\.\./[\w-]+\.md)\)", "".join(s.read_text("utf-8") for s in SCRIPTS.values())):
        assert (ROOT / "docs" / link[3:]).exists(), link


def test_rlhf_learns_what_the_judge_likes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'bandpo[trl]'")
    result = runpy.run_path(str(ROOT / "examples" / "rlhf_trl.py"))["main"](["--reward-steps", "40", "--steps", "24"])
    assert result["right"] > 0.7
    assert result["reward_after"] > result["reward_before"]
    assert result["even_after"] > result["even_before"] + 0.4  # about 0.8 more digits of 4; noise is about 0.1
    assert result["clipped"] > 0
    assert "learned reward: " in capsys.readouterr().out
