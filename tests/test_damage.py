"""Damaged run folders and bad command lines: none ends in a traceback, none goes on to other weights.

A run that goes on from an older checkpoint ends with the same weights, so every run that ends well must have them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_support import SHORT, in_a_process, quick_pages, records, train, weights

from bandpo.lab.trl.callbacks import Recorder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_pages():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, the same interrupted before its last step, and one with another seed."""

    def stop(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("runs")
    assert train(SHORT, folder / "whole") == 0
    assert train(f"{SHORT} --seed 1", folder / "other") == 0
    assert weights(folder / "other") != weights(folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_step_begin", stop)
        assert train(SHORT, folder / "stopped") == 1
    return folder


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def says(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: path.write_bytes(data) and None


def add(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: path.write_bytes(path.read_bytes() + data) and None


def edit(**fields: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **fields})) and None


def wrong_arrays(path: Path) -> None:
    np.savez(path, logps=np.zeros(3), step=np.zeros(2))


def elsewhere(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def copied(name: str) -> Callable[[Path], None]:
    """The other run's checkpoint in the place of this one's."""

    def damage(path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(OTHER[0] / "checkpoints" / name, path)

    return damage


OTHER: list[Path] = []
NEW, OLD = "checkpoints/checkpoint-6", "checkpoints/checkpoint-4"
WEIGHTS = f"{NEW}/model.safetensors"
# damage, and what has to be said about it; "" where there is nothing to say
CHECKPOINTS: list[tuple[str, Callable[[Path], Any], str]] = [
    *[(f"{NEW}/{name}", Path.unlink, f"checkpoint-6 cannot be used, {name} is missing") for name in (
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "training_args.bin",
    )],
    *[(f"{NEW}/{name}", how, f"checkpoint-6 cannot be used, {name} is damaged") for name in (
        "model.safetensors", "optimizer.pt", "rng_state.pth",
    ) for how in (cut, flip, says(b""))],
    *[(f"{NEW}/trainer_state.json", says(text), "trainer_state.json is damaged") for text in ("[]", "{}", "null")],
    (f"{NEW}/bandpo.json", Path.unlink, "it has no bandpo.json"),
    *[(f"{NEW}/bandpo.json", says(text), "bandpo.json is damaged") for text in ("", "[]", "{}", "null", '{"run": 3}')],
    (f"{NEW}/bandpo.json", edit(run="00000000"), "it belongs to another run"),
    (f"{NEW}/bandpo.json", edit(number=4), "is that of another checkpoint"),
    (f"{NEW}/bandpo.json", edit(files={}), "is that of another checkpoint"),
    (f"{NEW}/bandpo.json", edit(files=[1]), "bandpo.json is damaged"),
    (NEW, copied("checkpoint-6"), "it belongs to another run"),
    (NEW, shutil.rmtree, ""),
    (f"{NEW}/trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    ("checkpoints/checkpoint-7", Path.mkdir, ""),
    ("checkpoints/checkpoint-7", copied("checkpoint-6"), "it belongs to another run"),
    ("checkpoints/checkpoint-99999999999", Path.mkdir, ""),
    ("checkpoints/checkpoint-abc", Path.mkdir, ""),
    ("checkpoints/checkpoint-7", says("x"), ""),
]  # fmt: skip
FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("metrics.jsonl", Path.unlink, ""),
    ("metrics.jsonl", says(b""), ""),
    ("metrics.jsonl", add('{"event": "st'), ""),
    ("metrics.jsonl", cut, ""),
    *[("metrics.jsonl", add(line), "metrics.jsonl has 1 lines that are no records") for line in (
        b"\xff\xfe\n", "{}\n", "[1]\n", "3\n", '{"step": -1}\n', '{"step": "x"}\n', "[" * 5000 + "\n", "\0\n",
        '{"event": "eval", "step": 1}\n',
    )],
    ("metrics.jsonl", folder_instead, "metrics.jsonl cannot be read"),
    ("metrics.jsonl", elsewhere, "metrics.jsonl cannot be read"),
    ("tokens.npz", Path.unlink, ""),
    *[("tokens.npz", how, "tokens.npz cannot be read") for how in (cut, says(b""), says("x"), wrong_arrays)],
    ("samples.json", Path.unlink, ""),
    *[("samples.json", how, "") for how in (cut, says("{}"), says("[3]"), says(b"\xff"), folder_instead)],
    ("run.json", Path.unlink, ""),
    *[("run.json", how, "run.json cannot be read") for how in (
        cut, says(b""), says("[]"), says(b"\xff"), says("[" * 9999),
    )],
    ("run.json", folder_instead, "run.json cannot be read"),
    ("run.json", edit(before=3, clip_args=[1]), "of another kind"),
    ("run.json", edit(overrides="x"), ""),
    ("run.json", edit(trained={"a": [1, 2]}), ""),
    ("recipe.yaml", Path.unlink, ""),
    *[("recipe.yaml", how, "recipe.yaml") for how in (cut, says("["), says(b"\xff"), elsewhere, folder_instead)],
    ("recipe.yaml", says("task: addition"), ""),
    ("model", Path.mkdir, ""),
    ("model", says("x"), ""),
    ("model.partial", Path.mkdir, ""),
    ("model.partial", says("x"), ""),
    ("run.json.partial", says("x"), ""),
    ("run.json.partial", Path.mkdir, ""),
    ("report.html", Path.mkdir, ""),
    ("arms", says("x"), ""),
    (".lock", Path.unlink, ""),
    (".lock", folder_instead, "cannot be written"),
    (".lock", says("process 1 on nowhere"), ""),
]  # fmt: skip
FOLDERS = CHECKPOINTS + FILES


@pytest.mark.parametrize("number", range(len(FOLDERS)), ids=lambda i: f"{i}-{FOLDERS[i][0]}")
def test_a_damaged_folder_ends_with_the_same_weights_or_says_why_not(
    number: int, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, said = FOLDERS[number]
    OTHER[:] = [runs / "other"]
    out = tmp_path / "run"
    shutil.copytree(runs / "stopped", out)
    damage(out / name)
    capsys.readouterr()
    code = train("train demo --json --resume", out)
    printed, errors = capsys.readouterr()
    assert code in (0, 2), f"{name}: {errors}"
    assert "Traceback" not in printed + errors and not (out / "error.txt").exists()
    assert said in printed + errors, printed + errors
    if code == 0:
        assert weights(out) == weights(runs / "whole") and (out / "report.html").exists()
    else:
        assert errors.count("\n") == 1 and str(out) in errors, errors


def test_a_kill_at_any_moment_leaves_what_goes_on_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    """BANDPO_KILLS sets how many; a run is killed again and again until it comes to its end by itself."""
    started = time.monotonic()
    assert in_a_process(SHORT, tmp_path / "timed") == 0
    whole, moment = time.monotonic() - started, random.Random(0)
    killed = number = 0
    while killed < int(os.environ.get("BANDPO_KILLS", "3")):
        number, out = number + 1, tmp_path / str(number)
        while code := in_a_process(f"{SHORT} --requeue", out, moment.uniform(0.05, 0.9) * whole):
            assert code == -signal.SIGKILL
            killed += 1
        assert in_a_process(f"{SHORT} --requeue", out) == 0
        assert weights(out) == weights(runs / "whole") and records(out) == records(runs / "whole")
        assert (out / "samples.json").read_bytes() == (runs / "whole" / "samples.json").read_bytes()
    print(f"{killed} kills of {number} runs, each {whole:.1f} s: all bit-equal")
