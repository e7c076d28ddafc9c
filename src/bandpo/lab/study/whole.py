"""A study from its folder to its figures: what `bandpo study` does, for a command line or a program."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bandpo._input import InputError
from bandpo.lab.study import records
from bandpo.lab.study.file import Study
from bandpo.lab.study.folder import StudyFolder
from bandpo.lab.study.matrix import Planned
from bandpo.lab.study.records import FILE
from bandpo.lab.study.runner import FINAL, Tell, Work, check_recipes, make_models, run_study


def make(
    study: Study,
    folder: StudyFolder,
    runs: Sequence[Planned],
    words: Sequence[str] = (),
    *,
    jobs: int = 1,
    tell: Tell = lambda event: None,
    watch: Callable[[Work], None] = lambda work: None,
    note: Callable[[str], None] = lambda line: None,
) -> Work:
    """Make the runs of a study that have not ended yet.

    Args:
        study: from `read_study`.
        folder: its folder, which one process owns.
        runs: from `plan`.
        words: keys of the command line, which `plan` was given too.
        jobs: runs at a time.
        tell: takes an event for every run and model that ends.
        watch: called a few times a second while runs are made.
        note: takes a line for the person.

    Returns:
        What was done; `failed` names the runs that did not end well.

    Raises:
        InputError: a recipe or the folder cannot be used.
    """
    folder.check()
    with folder.claimed():
        found = folder.open(study, runs, words)
        if foreign := folder.foreign(runs):
            note(f"{len(foreign)} folders in {folder.runs} are no runs of this plan and are left alone ({foreign[0]})")
        return run_study(study, folder, runs, found, jobs=jobs, tell=tell, watch=watch)


def emit(
    study: Study,
    folder: StudyFolder,
    runs: Sequence[Planned],
    words: Sequence[str] = (),
    *,
    jobs: int = 1,
    check: bool = True,
) -> list[str]:
    """Return the command of each run that has not ended, for Slurm or GNU parallel; models are made first.

    Args:
        study: from `read_study`.
        folder: its folder, which one process owns.
        runs: from `plan`.
        words: keys of the command line, which `plan` was given too.
        jobs: models at a time.
        check: whether the engine looks at every recipe before.

    Returns:
        One command a run; each goes on where it was, and the study's own command collects what they made.

    Raises:
        InputError: a recipe or the folder cannot be used, or a model cannot be made.
    """
    folder.check()
    with folder.claimed():
        found = folder.open(study, runs, words)
        ended = {run.key for run in found.runs if run.status in FINAL}
        left = [
            run for run in runs if (run.arm, run.setting, run.seed) not in ended and not folder.ended_elsewhere(run)
        ]
        if check and left:
            check_recipes(folder, left)
        make_models(study, folder, found, left, jobs)
    return [f"{folder.command(run)} --requeue" for run in left]


def is_study(path: Path) -> bool:
    """Whether a folder, or a file, holds the records of a study."""
    return path.name.endswith(FILE) if os.path.isfile(path) else os.path.isfile(path / FILE)


def report(path: Path, page: Path) -> dict[str, Any]:
    """Write the page of a study from its records alone.

    Args:
        path: the study's folder, or the records' file.
        page: the file to write.

    Returns:
        The figures, with "report", the page's path.

    Raises:
        InputError: there are no records, or they are damaged, or the page cannot be written.
    """
    from bandpo.lab.report.study import write_report

    found = records.read(path)
    if found is None:
        raise InputError(f"{path}: holds no records of a study; give the --out folder of `bandpo study`")
    return write_report(found, page)


def finish(folder: StudyFolder, work: Work, page: Path | None = None) -> dict[str, Any]:
    """Write the page, and return every figure on it.

    Args:
        folder: the study's folder.
        work: what was done.
        page: the file; None for report.html in the folder.

    Returns:
        The figures, with "report", the page's path, and "failed", the runs that did not end well.
    """
    from bandpo.lab.report.study import write_report

    figures = write_report(work.records, page or folder.report)
    return {"event": "done", **figures, "out": str(folder.path), "failed": work.failed}
