"""A process that has the engine loaded and forks for each run: loading takes as long as a fifth of a tiny run.

It reads jobs from stdin and writes answers to stdout, one JSON object a line, and ends with whoever started it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from bandpo._input import InputError

LOOK = 0.05  # seconds between two looks at a run
CAN_FORK = sys.platform == "linux"


def main() -> int:
    """Do jobs until stdin ends.

    Returns:
        Exit code.
    """
    study = os.getppid()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    import bandpo.lab.models.warmup
    import bandpo.lab.trl.run  # noqa: F401
    from bandpo.lab.models import TINY
    from bandpo.lab.models.load import load_model

    load_model(TINY)  # what the first loading of a model makes and keeps is made once
    gc.collect()
    gc.freeze()  # nothing that is loaded is looked at again, or copied, by a run's collections
    for line in sys.stdin:
        print(json.dumps(_apart(json.loads(line), study)), file=answers, flush=True)
    return 0


def _apart(job: dict[str, Any], study: int) -> dict[str, Any]:
    """Do a job in a process of its own, which a crash of the job ends, and the end of the study too."""
    if not CAN_FORK:
        return do(job)
    come, go = os.pipe()
    child, me = os.fork(), os.getpid()
    if child == 0:
        os.close(come)
        _end_with(os.getppid())
        _forked(job, go)
    os.close(go)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if os.getppid() != study:
            os.kill(child, 9)
            os._exit(1)
        time.sleep(LOOK)
    with os.fdopen(come, encoding="utf-8") as answer:
        told = answer.read()
    with suppress(ValueError):
        return dict(json.loads(told))
    return {"status": "failed", "error": f"its process was killed (a child of process {me}); was memory short?"}


def _end_with(parent: int) -> None:
    """End this process soon after its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _forked(job: dict[str, Any], go: int) -> None:
    code = 1
    try:
        if job.get("log"):
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115 - a library that asks finds nobody there
        answer = do(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(go, json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job.

    Args:
        job: "do" is "check", "warmup" or "run"; the rest is what that function takes.

    Returns:
        status ("done", "stopped", "failed" or "wrong", for what the user has to mend) and error.
    """
    given = {key: value for key, value in job.items() if key not in ("do", "log")}
    try:
        DO[job["do"]](**given)
    except InputError as error:
        return {"status": "wrong", "error": str(error)}
    except FloatingPointError as error:
        return {"status": "stopped", "error": str(error)}
    except Exception as error:  # a run may fail by anything, and stops no other
        traceback.print_exc()
        return {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"status": "done"}


def check(recipes: list[str]) -> None:
    """Check recipes as the engine will.

    Args:
        recipes: YAML files.

    Raises:
        InputError: one cannot be used; names it.
    """
    from bandpo.lab.recipe import load
    from bandpo.lab.trl.config import to_lora, to_trl

    for path in recipes:
        recipe = load(path)
        try:
            to_trl(recipe, "checkpoints")
            to_lora(recipe)
            recipe.make_rewards(recipe.make_task())
        except InputError as error:
            raise InputError(f"{Path(path).stem}: {error}") from None


def make_warm(out: str, task: str, task_args: dict[str, Any], steps: int | None, seed: int) -> None:
    """Make a model that runs start from.

    Args:
        out: its folder.
        task: what it learns.
        task_args: the task's settings.
        steps: updates; None for what the task says.
        seed: of weights and demonstrations.

    Raises:
        InputError: the tiny model cannot learn that task.
    """
    import shutil

    import torch

    from bandpo.lab.models.warmup import warm_up
    from bandpo.lab.tasks import SmallTask, get_task

    torch.set_num_threads(1)
    made = get_task(task, **task_args)
    if not isinstance(made, SmallTask):
        raise InputError(f"warmup: task {task!r} is none that the tiny model learns; leave warmup out")
    partial = Path(f"{out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    warm_up(partial, steps=steps, seed=seed, task=made)
    partial.replace(out)


def run(recipe: str, out: str, command: str) -> None:
    """Train by a recipe, as `bandpo train` does, but for the report.

    Args:
        recipe: a YAML file.
        out: the run's folder; a run that is there is gone on with.
        command: the command to repeat it.

    Raises:
        InputError: the recipe or the folder cannot be used.
        FloatingPointError: the run met a NaN or an infinity.
    """
    from bandpo.lab.reading import read_recipe
    from bandpo.lab.run.display import Display
    from bandpo.lab.run.folder import RunFolder
    from bandpo.lab.run.session import Session, open_session
    from bandpo.lab.trl.run import run as train

    class Log(Display):
        def emit(self, event: dict[str, Any]) -> None:
            if event["event"] == "note":
                print(event["text"], flush=True)

    class WithoutReport(Session):
        def finish(self) -> dict[str, Any]:
            return {}

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    folder = RunFolder(Path(out))
    with folder.claimed():
        session = open_session(
            read_recipe(recipe), [], folder, Log(), engine="trl", command=lambda words: command,
            resume=folder.has_run(),
        )  # fmt: skip
        train(WithoutReport(**{field.name: getattr(session, field.name) for field in fields(session)}))


DO: dict[str, Callable[..., None]] = {"check": check, "warmup": make_warm, "run": run}

if __name__ == "__main__":
    sys.exit(main())
