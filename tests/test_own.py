"""The page for one's own task, reward, clip and divergence: each block is written, run, and does what it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bandpo import cli
from bandpo.lab.answers import read_answers

PAGE = (Path(__file__).parent.parent / "docs" / "own.md").read_text("utf-8")
BLOCKS = re.findall(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', PAGE, flags=re.MULTILINE | re.DOTALL)
QUICK = ["--json", "--eval_every", "0", "--eval_samples", "1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which every block of the page was run, in its order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("mine"))
        for language, file, text in BLOCKS:
            if file:
                Path(file).write_text(text)
            elif language == "python":
                exec(compile(text, "own.md", "exec"), {})
            else:
                assert language == "bash"
                for line in text.replace("\\\n", " ").splitlines():
                    program, command, *words = shlex.split(line)
                    quick = [word for word in QUICK if command == "train"]
                    with contextlib.redirect_stdout(io.StringIO()):
                        assert program == "bandpo" and cli.main([command, *words, *quick]) == 0, line
        yield folder


def steps(run: Path) -> list[dict[str, Any]]:
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in found] == list(range(1, 33))
    return found


def test_the_page_has_a_block_of_each_kind() -> None:
    assert [file for _, file, _ in BLOCKS if file] == [
        "train.jsonl", "test.jsonl", "doubles.py", "tidy.py", "bell.py", "lecam.py", "mine.yaml",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_and_a_task_of_ones_own_are_asked_and_graded(ran: Path) -> None:
    steps(ran / "runs" / "data")
    samples = json.loads((ran / "runs" / "data" / "samples.json").read_text())
    assert {(s["prompt"], s["answer"]) for s in samples} == {("555+305=", "0860"), ("128+416=", "0544")}

    first = steps(ran / "runs" / "doubles")[0]  # of a rollout, which has the rewards
    assert 0 < first["reward"] < 1 and first["reward"] * 512 % 1 and first["grading/failed"] == 0, (
        "a part for each digit"
    )
    found = [read_answers(file) for file in sorted((ran / "evals" / "doubles").glob("*.jsonl.gz"))]
    assert len(found) == 2
    for answers in found:
        assert answers.scores.shape == (64, 8)
        for row, texts, scores in zip(answers.rows, answers.texts, answers.scores, strict=True):
            a, b = row["question"].rstrip("=").split("+")
            right = str(int(a) + int(b)).zfill(4)
            assert a == b and row["answer"] == right
            assert scores == pytest.approx([np.mean([*map(str.__eq__, text.ljust(4), right)]) for text in texts])


def test_a_reward_of_ones_own_is_added_with_its_weight(ran: Path) -> None:
    for record in steps(ran / "runs" / "tidy")[::16]:
        parts = record["rewards/reward/mean"], record["rewards/four_digits/mean"]
        assert record["reward"] == pytest.approx(parts[0] + 0.1 * parts[1], abs=1e-6) and parts[0] <= parts[1] <= 1


def test_a_clip_and_a_divergence_of_ones_own_take_gradient_away(ran: Path) -> None:
    for name, clip in (("bell", "bell.py:Bell"), ("lecam", "band")):
        records = steps(ran / "runs" / name)
        assert yaml.safe_load((ran / "runs" / name / "recipe.yaml").read_text())["clip"] == clip
        assert min(record["clip/gradient_kept"] for record in records) < 1
    assert max(record["clip/zero_grad_above"] for record in records) > 0  # the band's; the bell takes a part from each


def test_all_of_it_stands_in_one_recipe(ran: Path) -> None:
    recipe = yaml.safe_load((ran / "runs" / "mine" / "recipe.yaml").read_text())
    assert recipe["task"] == "doubles.py:Doubles" and recipe["clip_args"]["high"]["divergence"] == "lecam.py:lecam"
    assert all("rewards/four_digits/mean" in record for record in steps(ran / "runs" / "mine")[::16])
    for run in (ran / "runs").iterdir():
        assert "report.html" in {file.name for file in run.iterdir()}, run.name


def test_a_task_whose_right_answers_do_not_pass_is_not_trained_on(tmp_path: Path, capsys: Any) -> None:
    doubles = next(text for _, file, text in BLOCKS if file == "doubles.py")
    (tmp_path / "doubles.py").write_text(doubles.replace("sum(right) /", "0.5 * sum(right) /"))
    words = ["train", "demo", "--task", f"{tmp_path}/doubles.py:Doubles", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2 and not (tmp_path / "run").exists()
    assert "scores 0.5; mend score()" in capsys.readouterr().err.splitlines()[-1]
