"""What every task must keep: a check to run on one's own, and before a training."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bandpo._input import InputError
from bandpo.lab.tasks.base import Task

JUNK = (
    "",
    "banana",
    "\x00",
    "\ud800",
    "<answer></answer>",
    "<answer>9**9**9**9</answer>",
    "<answer>__import__('os').system('true')</answer>",
    "[" * 500,
    "{}",
)


def check_task(task: Task, *, prompts: int = 8) -> None:
    """Check that a task is one: its problems are whole, held-out ones stay out, right answers pass and junk does not.

    Args:
        task: the task.
        prompts: held-out problems to look at, at most.

    Returns:
        None.

    Raises:
        InputError: the first check that fails: what, for which problem, and the way out.
    """
    prompts = min(prompts, task.eval_size or prompts)
    evaluated = _rows(task, "eval_dataset", prompts)
    if len(evaluated) != prompts:
        raise _wrong(task, f"eval_dataset({prompts}) gives {len(evaluated)} problems", "give as many as asked for")
    if evaluated != _rows(task, "eval_dataset", prompts):
        raise _wrong(task, "eval_dataset gives other problems the second time", "draw them from a fixed seed")
    _check_grader(task, evaluated)
    trained = _rows(task, "train_dataset", 0)
    if trained != _rows(task, "train_dataset", 0):
        raise _wrong(task, "train_dataset(0) gives other problems the second time", "let only the seed decide")
    _check_grader(task, trained[:prompts])
    if task.holds_out and (both := {r["question"] for r in evaluated} & {r["question"] for r in trained}):
        raise _wrong(
            task,
            f"{min(both)[:80]!r} is both trained on and held out",
            "split with held_out(), or set holds_out = False",
        )


def check_grader(task: Task, prompts: int = 4) -> None:
    """Check that right answers to held-out problems score 1: the part of `check_task` that costs nearly nothing.

    Args:
        task: the task.
        prompts: held-out problems to look at.

    Returns:
        None.

    Raises:
        InputError: one does not.
    """
    _check_grader(task, _rows(task, "eval_dataset", min(prompts, task.eval_size or prompts)))


def _rows(task: Task, method: str, argument: int) -> list[dict[str, Any]]:
    """A dataset's rows, whose columns are looked at."""
    rows = [dict(row) for row in getattr(task, method)(argument)]
    if not rows:
        raise _wrong(task, f"{method} gives no problem", "give at least one")
    for row in rows:
        if missing := {"prompt", "question", "answer"} - set(row):
            raise _wrong(task, f"{method} has no column {min(missing)!r}", "give prompt, question and answer")
        if not isinstance(row["question"], str) or not isinstance(row["answer"], str):
            raise _wrong(task, f"{method}: question and answer of {row['question']!r} must be text", "convert them")
        prompt = row["prompt"]
        chat = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not chat and not (isinstance(prompt, str) and prompt):
            raise _wrong(task, f"{method}: the prompt {prompt!r} is no text and no chat", "give one of the two")
    return rows


def _check_grader(task: Task, rows: list[dict[str, Any]]) -> None:
    from bandpo.lab.grading import grade

    known, before = [row for row in rows if task.gold(row)], Counter(task.failures)
    right = grade(task, [task.gold(row) for row in known], known)
    wrong = grade(task, list(JUNK), rows[:1] * len(JUNK))
    task.failures.clear()
    task.failures.update(before)  # those are no model's answers
    for row, result in zip(known, right, strict=True):
        if result.score != 1:
            what = f"the answer {task.gold(row)[:80]!r} to {row['question'][:80]!r} scores {result.score:g}"
            why = f" ({result.why})" if result.why else ""
            raise _wrong(task, what + why, "mend score(), or give gold(), an answer that scores 1")
    for junk, result in zip(JUNK, wrong, strict=True):
        if result.score >= 1:
            raise _wrong(task, f"{junk!r} as an answer to {rows[0]['question'][:80]!r} scores 1", "mend score()")


def _wrong(task: Task, what: str, way_out: str) -> InputError:
    return InputError(f"task {task.name!r}: {what}; {way_out}")
