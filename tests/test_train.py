"""`bandpo train` as a person runs it: to the end, killed, interrupted, resumed, gone wrong, compared.

The long runs are processes of their own, as only a process can be killed; they share two trainings between all tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bandpo import cli
from bandpo.lab.trl.callbacks import MAX_TOKENS, Recorder, TokenSampler

DEMO = "train demo --json --learning_rate 3e-4 --max_steps 128 --save_steps 32 --eval_every 64"
SHORT = "train demo --json --max_steps 32 --save_steps 16 --eval_every 0 --eval_prompts 16"
Event = dict[str, Any]


def start(words: str, out: Path, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bandpo", *words.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            # A shell that runs the tests in the background has told its children to ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def stop_at(process: subprocess.Popen[str], step: int, how: signal.Signals) -> list[Event]:
    """Send the signal once the step is reported; return the events that followed."""
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] >= step:
            process.send_signal(how)
            break
    return [json.loads(line) for line in process.communicate(timeout=120)[0].splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo in a short form, left alone; and the same, killed and then interrupted on the way."""
    folder = tmp_path_factory.mktemp("runs")
    whole = start(DEMO, folder / "whole", folder / "whole.log")
    broken = folder / "broken"
    killed = start(f"{DEMO} --requeue", broken, folder / "killed.log")
    stop_at(killed, 40, signal.SIGKILL)
    interrupted = start("train demo --json --resume", broken, folder / "interrupted.log")
    last_words = stop_at(interrupted, 72, signal.SIGINT)
    status = json.loads((broken / "run.json").read_text())["status"]
    resumed = start("train demo --json --resume", broken, folder / "resumed.log")
    second = [json.loads(line) for line in resumed.communicate(timeout=300)[0].splitlines()]
    first = [json.loads(line) for line in whole.communicate(timeout=300)[0].splitlines()]
    return {
        "folder": folder,
        "codes": [p.returncode for p in (whole, killed, interrupted, resumed)],
        "last_words": last_words,
        "status": status,
        "events": first,
        "resumed_events": second,
    }


def records(run: Path) -> list[Event]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_the_demo_gets_better_and_says_so(runs: dict[str, Any]) -> None:
    assert runs["codes"][0] == 0, (runs["folder"] / "whole.log").read_text()
    done = runs["events"][-1]
    keys = "event accuracy_before accuracy_after entropy_before entropy_after clipped out report"
    assert list(done) == keys.split() and done["event"] == "done"
    info = json.loads((runs["folder"] / "whole" / "run.json").read_text())
    assert info["status"] == "done" and info["before"]["accuracy"] == done["accuracy_before"]
    assert info["after"]["low"] > info["before"]["high"]  # clearly: the intervals do not touch
    assert 0 < done["clipped"] < 0.5


def test_each_step_is_reported_once(runs: dict[str, Any]) -> None:
    events = runs["events"]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 129))
    assert [event["rollout"] for event in steps] == [(step - 1) // 16 + 1 for step in range(1, 129)]
    assert all("reward" in steps[i] for i in range(0, 128, 16))
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 64, 128]
    assert (steps[-1]["steps"], steps[-1]["rollouts"], steps[-1]["left"]) == (128, 8, 0)


def test_the_folder_holds_what_it_promises(runs: dict[str, Any]) -> None:
    out = runs["folder"] / "whole"
    info = json.loads((out / "run.json").read_text())
    assert (
        info["command"].startswith("bandpo train demo --learning_rate 3e-4 --max_steps 128")
        and str(out) in info["command"]
    )
    assert info["versions"]["trl"] and info["machine"]["cores"] and info["seed"] == 0 and info["seconds"] > 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(out / "model")
    assert AutoTokenizer.from_pretrained(out / "model")("12+3=")["input_ids"]
    assert "2603.04918" in (out / "model" / "README.md").read_text()
    assert info["trained"]["model.safetensors"][0] == (out / "model" / "model.safetensors").stat().st_size
    samples = json.loads((out / "samples.json").read_text())
    assert set(samples[0]) == {"prompt", "answer", "before", "after", "correct_before", "correct_after"}
    assert "<html" in (out / "report.html").read_text()
    kept = sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-128", "checkpoint-96"]
    with np.load(out / "tokens.npz") as tokens:
        assert 1000 < len(tokens["logps"]) <= MAX_TOKENS
        assert not np.any(tokens["logps"] == tokens["old_logps"]) and np.all(np.diff(tokens["step"]) >= 0)
        assert tokens["step"].max() == 128 and np.any(tokens["advantages"] < 0) and np.any(tokens["advantages"] > 0)


def test_a_run_that_was_killed_and_interrupted_ends_bit_for_bit_as_one_left_alone(runs: dict[str, Any]) -> None:
    whole, broken = runs["folder"] / "whole", runs["folder"] / "broken"
    assert runs["codes"] == [0, -signal.SIGKILL, 1, 0]
    starts = [e["from_step"] for e in runs["resumed_events"] if e["event"] == "start"]
    assert starts == [64]
    assert records(broken) == records(whole)
    a, b = load_file(whole / "model" / "model.safetensors"), load_file(broken / "model" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a) and set(a) == set(b)
    assert (broken / "samples.json").read_text() == (whole / "samples.json").read_text()
    with np.load(whole / "tokens.npz") as x, np.load(broken / "tokens.npz") as y:
        assert all(np.array_equal(x[name], y[name]) for name in x.files)


def test_ctrl_c_says_how_to_go_on(runs: dict[str, Any]) -> None:
    message = runs["last_words"][-1]["message"]
    assert message.endswith("--resume") and str(runs["folder"] / "broken") in message and "\n" not in message
    assert (runs["folder"] / "interrupted.log").read_text().strip() == message
    assert runs["status"] == "interrupted"


def train(words: str, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Event], str]:
    """The same in this process, which has its imports behind it."""
    capsys.readouterr()
    code = cli.main([*words.split(), "--out", str(out)])
    stdout, stderr = capsys.readouterr()
    return code, [json.loads(line) for line in stdout.splitlines()], stderr


def test_a_nan_stops_the_run_at_once_and_the_last_checkpoint_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(self: Recorder, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 20:
            next(model.parameters()).data.fill_(float("nan"))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_begin", spoil)
        code, events, stderr = train(SHORT, out, capsys)
    assert code == 1 and "Traceback" not in stderr
    for words in ("step 21", "logps are not finite", "try "):
        assert words in events[-1]["message"] and words in stderr
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "failed" and "step 21" in info["error"]
    assert [record["step"] for record in records(out)][-1] == 20

    code, events, stderr = train("train demo --json --resume --learning_rate 0.5", out, capsys)
    assert code == 2 and "learning_rate=0.5" in stderr and "learning_rate=" in stderr.split("started with")[1]

    code, events, stderr = train("train demo --json --resume --warmup", out, capsys)
    assert code == 2 and "started without it" in stderr

    code, events, _ = train("train demo --json --resume", out, capsys)
    assert code == 0 and next(e for e in events if e["event"] == "start")["from_step"] == 16
    assert [record["step"] for record in records(out)] == list(range(1, 33))
    weights = (out / "model" / "model.safetensors").read_bytes()

    # A kill during the last evaluation: the model is there and is not trained again.
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**info, "status": "running", "after": None}))
    code, events, _ = train("train demo --json --resume", out, capsys)
    assert code == 0 and [e["event"] for e in events if e["event"] in ("start", "step", "eval")] == ["eval"]
    assert json.loads((out / "run.json").read_text())["after"] == info["after"]

    code, events, _ = train("train demo --json --resume", out, capsys)
    assert code == 0 and events[-1]["event"] == "done" and not [e for e in events if e["event"] in ("start", "step")]
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_stale_rollouts_are_a_key_of_the_recipe_and_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 40:
            raise KeyboardInterrupt

    words = f"{SHORT} --max_steps 64 --staleness 2"
    code, events, stderr = train(words, tmp_path / "whole", capsys)
    assert code == 0, stderr
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_begin", stop)
        assert train(words, tmp_path / "stopped", capsys)[0] == 1
    code, events, _ = train("train demo --json --resume", tmp_path / "stopped", capsys)
    assert code == 0 and next(e for e in events if e["event"] == "start")["from_step"] == 32
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    assert records(whole) == records(stopped)
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = [record["clip/kl_mean"] for record in records(whole) if record["step"] % 16 == 1]
    assert abs(moved[0]) < 1e-9 < 1e-6 < min(moved[1:]), (
        "at the first update of a rollout, its policy is already an older one"
    )


def test_compare_trains_the_arms_with_the_same_seed_and_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []
    monkeypatch.setattr("bandpo.lab.trl.run.warm_up", _short_warm_up(made))
    out = tmp_path / "run"
    code, events, _ = train(f"{SHORT} --max_steps 16 --compare --warmup", out, capsys)
    assert code == 0 and made == [1]
    assert [e.get("arm") for e in events if e["event"] == "start"] == [None, "none", "fixed"]
    summary = next(e for e in events if e["event"] == "summary")
    assert [run["clip"] for run in summary["runs"]] == ["band", "fixed", "none"]
    assert events[-1]["event"] == "done" and events[-1]["out"] == str(out)
    first = {run: records(run)[0] for run in (out, out / "arms" / "none", out / "arms" / "fixed")}
    assert len({record["reward"] for record in first.values()}) == 1  # the first rollout is the same in all three
    assert all(record["clipped"] == 0 for record in records(out / "arms" / "none"))
    info = {arm: json.loads((out / "arms" / arm / "run.json").read_text()) for arm in ("none", "fixed")}
    assert {arm: (i["clip"], i["clip_args"], i["status"]) for arm, i in info.items()} == {
        "none": ("none", {}, "done"),
        "fixed": ("fixed", {}, "done"),
    }
    page = (out / "report.html").read_text()
    assert "fixed" in page and "--compare --warmup" in page


def _short_warm_up(made: list[int]) -> Callable[..., dict[str, Any]]:
    from bandpo.lab.models.warmup import warm_up

    def short(out: Path, *, progress: Any) -> dict[str, Any]:
        made.append(1)
        return warm_up(out, steps=2, progress=progress)

    return short


def test_smoke_makes_two_steps_in_a_folder_of_its_own_and_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "demo", "--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loading")
    assert [line.split("  ")[0] for line in lines if line.startswith("step 2/")] == ["step 2/2"]
    assert any("band" in line and "held out" not in line and "[" in line for line in lines)  # the closing table
    assert lines[-1].strip() == "report: runs/demo-smoke/report.html"
    assert max(map(len, lines[-6:])) <= 80


def test_the_kept_tokens_are_spread_evenly_and_no_more_than_allowed() -> None:
    def sampler(steps: range, kept: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        keeper = TokenSampler(kept)
        for step in steps:
            for micro in range(2):
                generator = torch.Generator().manual_seed(2 * step + micro)
                old, new, advantages = torch.rand(3, 40, 30, generator=generator)
                new[:, :10] = old[:, :10]
                mask = torch.ones(40, 30)
                mask[:20] = 0
                keeper.add(step, 2, 50, (new, old, advantages), mask)
        return keeper.arrays()

    state = torch.get_rng_state()
    whole = sampler(range(1, 51), {})
    assert torch.equal(state, torch.get_rng_state())
    assert len(whole["logps"]) == MAX_TOKENS
    assert set(np.bincount(whole["step"])[1:]) == {MAX_TOKENS // 50}
    assert not np.any(whole["logps"] == whole["old_logps"])
    part = sampler(range(1, 21), {})
    resumed = sampler(range(21, 51), part)
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
