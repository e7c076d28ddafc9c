"""A short run of the demo, and what a test asks of its folder."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from bandpo import cli

SHORT = (
    "train demo --json --steps_per_generation 2 --num_generations 4 --per_device_train_batch_size 8 --max_steps 8 "
    "--save_steps 2 --eval_every 0 --eval_prompts 4 --eval_samples 1"
)


def train(words: str, out: Path) -> int:
    return cli.main([*words.split(), "--out", str(out)])


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@contextmanager
def quick_pages() -> Iterator[None]:
    """Figures are made and not drawn, and the many objects of the imports are not looked through again and again."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bandpo.lab.report.figures.inline", lambda figure, label: "<svg></svg>")
        yield
    gc.unfreeze()


def in_a_process(words: str, out: Path, kill_after: float | None = None) -> int:
    """The command in a process of its own, which has the imports behind it; its exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                code = train(words, out)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
