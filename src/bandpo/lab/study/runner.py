"""Runs a study: some workers, each with one run at a time; what ends is recorded at once, what fails stops nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bandpo._input import InputError
from bandpo.lab.study.file import Study
from bandpo.lab.study.folder import StudyFolder
from bandpo.lab.study.matrix import Planned, WarmModel
from bandpo.lab.study.records import Records

Tell = Callable[[dict[str, Any]], None]
FINAL = ("done", "stopped")  # a run that met a NaN would meet it again


@dataclass
class Work:
    """What is left to do, shared by the threads that feed the workers.

    Args:
        folder: the study's folder.
        study: the study.
        records: what has ended.
        left: runs not begun.
        tell: takes events.

    Attributes:
        running: what is being done, by its name.
        failed: runs that did not end well in this round, and why.
        wrong: what the user has to mend before anything can go on.
    """

    folder: StudyFolder
    study: Study
    records: Records
    left: list[Planned]
    tell: Tell
    running: dict[str, Planned | WarmModel] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: str | None = None
    stopping: bool = False

    def __post_init__(self) -> None:
        self.turn = threading.Condition()
        self.models: list[WarmModel] = []
        self._broken: dict[Path, str] = {}

    def take(self) -> Planned | WarmModel | None:
        """The next thing to do, waiting for a model that another worker makes; None where nothing is left."""
        with self.turn:
            while not self.stopping:
                self._give_up()
                ready = next((run for run in self.left if run.warm is None or run.warm.path.is_dir()), None)
                if ready is not None:
                    self.left.remove(ready)
                    self.running[ready.name] = ready
                    return ready
                if not self.left and not self.models:
                    return None
                models = (
                    [self.models.pop()]
                    if self.models
                    else [run.warm for run in self.left if run.warm and run.warm.path.name not in self.running]
                )
                if models:
                    self.running[models[0].path.name] = models[0]
                    return models[0]
                self.turn.wait(1.0)
            return None

    def _give_up(self) -> None:
        """Runs whose model could not be made have failed."""
        for run in [run for run in self.left if run.warm and run.warm.path in self._broken]:
            assert run.warm is not None
            self.left.remove(run)
            self._record(run, "failed", f"its warm-up model: {self._broken[run.warm.path]}")

    def ended(self, one: Planned | WarmModel, answer: dict[str, Any]) -> None:
        """Take note of how something ended."""
        with self.turn:
            if self.stopping:
                return
            status, error = answer["status"], answer.get("error")
            if isinstance(one, WarmModel):
                self.running.pop(one.path.name, None)
                if status != "done":
                    self._broken[one.path] = str(error)
                self.tell({"event": "model", "name": one.path.name, "status": status, "error": error})
            else:
                self.running.pop(one.name, None)
                self._record(one, "failed" if status == "wrong" else status, error)
            self.turn.notify_all()

    def _record(self, run: Planned, status: str, error: str | None) -> None:
        record = self.folder.collect(run, status, error)
        self.records.put(record)
        self.records.save(self.folder.path)
        if status == "done":
            self.folder.tidy(run, self.study.keep_models)
            with suppress(OSError):
                _log(self.folder, run).unlink()
        else:
            self.failed[run.name] = str(error)
        score = record.evals[-1].get("accuracy") if record.evals else None
        self.tell({
            "event": "run", "name": run.name, "status": status, "error": error, "seconds": record.seconds,
            "left": len(self.left) + len(self.running), "accuracy": score,
        })  # fmt: skip

    def stop(self) -> None:
        """Begin nothing more."""
        with self.turn:
            self.stopping = True
            self.turn.notify_all()


class Worker:
    """A process that does one job after another.

    Args:
        environment: variables of its own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job and wait for its answer; a process that dies is replaced at the next job.

        Args:
            job: as the worker's `do` takes it.

        Returns:
            Its answer.
        """
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bandpo.lab.study.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            return {"status": "failed", "error": f"its worker ended, exit code {self.process.wait()}"}
        return dict(json.loads(answer))

    def close(self) -> None:
        """End the process, and with it what it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def run_study(
    study: Study, folder: StudyFolder, runs: Sequence[Planned], found: Records, *, jobs: int, tell: Tell,
    watch: Callable[[Work], None],
) -> Work:  # fmt: skip
    """Make the runs that have not ended yet.

    Args:
        study: the study.
        folder: its folder, owned by this process.
        runs: its runs.
        found: its records.
        jobs: runs at a time.
        tell: takes an event for every run and model that ends.
        watch: called a few times a second while runs are made.

    Returns:
        What was done; `failed` names the runs that did not end well.

    Raises:
        InputError: a recipe cannot be used by the engine.
    """
    known = {run.key: run for run in found.runs}
    left = []
    for run in runs:
        if (before := known.get((run.arm, run.setting, run.seed))) is not None and before.status in FINAL:
            continue
        if folder.ended_elsewhere(run):
            found.put(folder.collect(run))
            folder.tidy(run, study.keep_models)
            continue
        left.append(run)
    found.save(folder.path)
    work = Work(folder, study, found, left, tell)
    if left:
        _make(work, max(1, min(jobs, len(left))), watch)
    return work


def make_models(study: Study, folder: StudyFolder, found: Records, runs: Sequence[Planned], jobs: int) -> None:
    """Make the models that runs start from.

    Args:
        study: the study.
        folder: its folder, owned by this process.
        found: its records.
        runs: the runs.
        jobs: models at a time.

    Raises:
        InputError: one cannot be made.
    """
    models = {run.warm.path: run.warm for run in runs if run.warm and not run.warm.path.is_dir()}
    bad: list[str] = []
    work = Work(folder, study, found, [], lambda e: bad.append(f"{e['name']}: {e['error']}") if e["error"] else None)
    work.models = list(models.values())
    if models:
        _make(work, min(jobs, len(models)), lambda work: None)
    if bad:
        raise InputError(f"warm-up model {bad[0]}")


def _make(work: Work, jobs: int, watch: Callable[[Work], None]) -> None:
    workers = [Worker(_environment()) for _ in range(jobs)]
    try:
        threads = [threading.Thread(target=_feed, args=(work, w, i == 0), daemon=True) for i, w in enumerate(workers)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch(work)
            for thread in threads:
                thread.join(0.5 / jobs)
    finally:
        work.stop()
        for worker in workers:
            worker.close()
    if work.wrong:
        raise InputError(work.wrong)


def check_recipes(folder: StudyFolder, runs: Sequence[Planned]) -> None:
    """Check every arm's recipe as the engine will.

    Args:
        folder: the study's folder.
        runs: the runs.

    Raises:
        InputError: one cannot be used; names its first run.
    """
    worker = Worker(_environment())
    try:
        if wrong := _check(worker, folder, runs):
            raise InputError(wrong)
    finally:
        worker.close()


def _check(worker: Worker, folder: StudyFolder, runs: Sequence[Planned]) -> str | None:
    first = {(run.arm, run.setting): run for run in reversed(runs)}
    answer = worker.do({"do": "check", "recipes": [str(folder.recipe_of(run)) for run in first.values()]})
    return None if answer["status"] == "done" else str(answer["error"])


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}


def _feed(work: Work, worker: Worker, first: bool) -> None:
    """Give a worker one job after another; the first one checks the recipes beforehand."""
    if first and work.left and (wrong := _check(worker, work.folder, work.left)):
        work.wrong = wrong
        work.stop()
    while (one := work.take()) is not None:
        work.ended(one, worker.do(_job(work, one)))


def _job(work: Work, one: Planned | WarmModel) -> dict[str, Any]:
    if isinstance(one, WarmModel):
        log = work.folder.path / "warmup" / f"{one.path.name}.log"
        return {
            "do": "warmup", "out": str(one.path), "task": one.task, "task_args": one.task_args, "steps": one.steps,
            "seed": one.seed, "log": str(log),
        }  # fmt: skip
    return {
        "do": "run", "recipe": str(work.folder.recipe_of(one)), "out": str(work.folder.runs / one.name),
        "command": work.folder.command(one), "log": str(_log(work.folder, one)),
    }  # fmt: skip


def _log(folder: StudyFolder, run: Planned) -> Path:
    return folder.runs / f"{run.name}.log"
