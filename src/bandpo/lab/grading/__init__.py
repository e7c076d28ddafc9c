"""Grading: a model's text is data. It is scored within a time limit, in a process that can be killed, and never run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bandpo.lab.grading.text import Completion, answer_text

if TYPE_CHECKING:
    from bandpo.lab.tasks.base import Task

__all__ = ["Completion", "Grade", "answer_text", "grade"]


@dataclass(frozen=True)
class Grade:
    """What an answer is worth.

    Args:
        score: the reward.
        why: why it could not be graded, and so scored 0; "" for an answer that was.
    """

    score: float
    why: str = ""

    @property
    def kind(self) -> str:
        """The reason without its details: "timeout", "refused", "crash", or the name of an exception."""
        return self.why.partition(":")[0]


def grade(task: Task, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
    """Score answers, from any thread; what cannot be graded scores 0 and is counted in `task.failures`.

    Args:
        task: whose `score` to use, where its `grading` says.
        texts: what the model wrote.
        rows: the problem of each.

    Returns:
        One grade per answer.

    Raises:
        InputError: the task cannot be sent to the process that grades.
    """
    if task.grading == "direct":
        grades = [_direct(task, text, row) for text, row in zip(texts, rows, strict=True)]
    else:
        from bandpo.lab.grading.process import shared

        keys = [(text, pickle.dumps(row)) for text, row in zip(texts, rows, strict=True)]
        jobs = dict(zip(keys, zip(texts, rows, strict=True), strict=True))  # equal answers are graded once
        known = dict(zip(jobs, shared().grade(task, list(jobs.values())), strict=True))
        grades = [known[key] for key in keys]
    task.failures.update(g.kind for g in grades if g.why)
    return grades


def _direct(task: Task, text: str, row: Mapping[str, Any]) -> Grade:
    try:
        return checked(task.score(text, row))
    except Exception as error:
        return Grade(0.0, reason(error))


def checked(value: Any) -> Grade:
    """A grade from what `score` returned.

    Args:
        value: a number; anything else is no grade.

    Returns:
        The grade; 0 with a reason for NaN or infinity.
    """
    score = float(value)
    return Grade(score) if math.isfinite(score) else Grade(0.0, f"ValueError: score returned {score}")


def reason(error: BaseException) -> str:
    """An exception in a line.

    Args:
        error: the exception.

    Returns:
        Its type and its message, at most 200 characters.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
