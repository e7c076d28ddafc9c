"""A run's folder: one owner, more steps later, no secret in it; and the page about runs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_support import SHORT, in_a_process, quick_pages, records, train, weights

from bandpo import cli
from bandpo.lab.recipe import SHARED
from bandpo.lab.run.folder import RunFolder

PAGE = (Path(__file__).parents[1] / "docs" / "train.md").read_text("utf-8")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_pages():
        yield


def test_a_folder_belongs_to_one_process_for_as_long_as_that_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready, hold = os.pipe(), RunFolder(tmp_path / "run")
    child = os.fork()
    if child == 0:
        try:
            with hold.claimed():
                os.write(ready[1], b"x")
                time.sleep(100)
        finally:
            os._exit(0)
    try:
        os.read(ready[0], 1)
        for words in (SHORT, f"{SHORT} --resume", f"{SHORT} --requeue"):
            assert train(words, hold.path) == 2
            error = capsys.readouterr().err
            assert f"process {child} on " in error and "is training into it" in error and error.count("\n") == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with hold.claimed():
        pass


def test_a_run_that_is_done_goes_on_to_more_steps_and_no_other_key_may_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(SHORT.replace("--max_steps 8", "--max_steps 12"), tmp_path / "whole") == 0
    out = tmp_path / "longer"
    assert train(SHORT, out) == 0
    before = json.loads((out / "run.json").read_text())
    for words, said in (
        ("--max_steps 6", "of a run that goes on only max_steps may grow"),
        ("--max_steps 12 --seed 1", "seed=1, but the run"),
        ("--max_steps 12 --clip none", "clip='none', but the run"),
    ):
        capsys.readouterr()
        assert train(f"train demo --json --resume {words}", out) == 2 and said in capsys.readouterr().err
    assert train("train demo --json --resume --max_steps 12", out) == 0
    assert weights(out) == weights(tmp_path / "whole")
    found = records(out)
    assert [r for r in found if r["event"] == "step"] == records(tmp_path / "whole")
    (middle,) = [r for r in found if r["event"] == "eval"]
    assert middle["step"] == 8 and middle["accuracy"] == before["after"]["accuracy"]
    after = json.loads((out / "run.json").read_text())
    assert after["before"] == before["before"] and after["command"].count("--max_steps 12") == 1
    assert train("train demo --json --resume", out) == 0, "and it stays at its new length"
    assert len(records(out)) == 13


def test_no_file_of_a_run_has_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_abcdefghijklmnop"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, secret)
    assert train(f"{SHORT} --max_steps 2", tmp_path / "run") == 0
    for words in (f"--hub_token {secret}", f"--trl.hub_token={secret}", "--trl {hub_token: hf_abcdefghijklmnop}"):
        word, value = re.split(r"[ =]", words, maxsplit=1)
        assert cli.main(["train", "demo", word, value, "--out", str(tmp_path / "no")]) == 2
        said = capsys.readouterr().err
        assert "is a secret" in said and secret not in said and not (tmp_path / "no").exists()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20 and [path for path in files if secret.encode() in path.read_bytes()] == []


def test_the_pages_recipe_and_reward_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    (reward,) = re.findall(r"^```python[^\n]*\n(.*?)^```$", PAGE, re.M | re.S)
    Path("page.yaml").write_text(recipe)
    Path("mine.py").write_text(reward)
    (line,) = re.findall(r"^bandpo train demo (--reward_funcs .*?) --out", PAGE, re.M)
    words = f"train page.yaml {line} --max_steps 32 --eval_prompts 8 --json"
    assert train(words, Path("run")) == 0
    first = records(Path("run"))[0]
    assert first["rewards/short/mean"] == pytest.approx(-0.01 * 4, abs=0.01)
    assert first["reward"] == pytest.approx(first["rewards/reward/mean"] + 0.5 * first["rewards/short/mean"], abs=1e-6)
    assert cli.main(["verl", "page.yaml", "--print"]) == 0, "one recipe for both"


def test_every_key_of_a_recipe_is_on_the_page() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    known = set(re.findall(r"`(\w+)`", table)) | {"trl", "verl"}
    beside = {"activation_checkpointing", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"}
    assert SHARED - known == beside, "the last three are the page's dots"


def test_a_run_that_is_killed_before_it_began_is_no_run(tmp_path: Path) -> None:
    assert in_a_process(SHORT, tmp_path / "run", kill_after=0.01) == -signal.SIGKILL
    assert not RunFolder(tmp_path / "run").has_run()
    assert train(f"{SHORT} --max_steps 2", tmp_path / "run") == 0
