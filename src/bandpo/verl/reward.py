"""The reward function that verl's reward workers load: a task's own grader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bandpo.train.tasks import Task

_lock = Lock()
_processes: list[ProcessPoolExecutor] = []  # one at most; verl calls from several threads


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    task: str,
    task_args: str,
    seed: int,
    eval_prompts: int,
    **_: Any,
) -> dict[str, Any]:
    """Grade a completion as the task does: 1 for a right one, 0 for any other.

    Args:
        data_source: the data's name; the task is named by `task`.
        solution_str: what the model wrote.
        ground_truth: the right answer.
        extra_info: the data's own; "question" names the problem.
        task: name of the task.
        task_args: the task's settings, JSON.
        seed: of the training problems.
        eval_prompts: number of held-out problems.
        **_: what verl passes to every reward function.

    Returns:
        score and acc (the reward) and the question, which verl writes beside each validation sample.
    """
    question = str((extra_info or {}).get("question", ""))
    job = (task, task_args, seed, eval_prompts, solution_str, ground_truth, question)
    reward = _process().submit(_grade, *job).result()
    return {"score": reward, "acc": reward, "question": question}


def _process() -> ProcessPoolExecutor:
    """The process that grades for this one: a grader that limits its time sets an alarm, which threads cannot."""
    with _lock:
        if not _processes:
            _processes.append(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        return _processes[0]


def _grade(task: str, task_args: str, seed: int, eval_prompts: int, text: str, answer: str, question: str) -> float:
    return _grader(task, task_args, seed, eval_prompts).reward([text], [answer], question=[question])[0]


@lru_cache(maxsize=4)
def _grader(task: str, task_args: str, seed: int, eval_prompts: int) -> Task:
    """The task, which has seen its problems: some scorers need more of a problem than its answer."""
    from bandpo.train.tasks import get_task

    made = get_task(task, **json.loads(task_args))
    made.train_dataset(seed)
    made.eval_dataset(eval_prompts)
    return made
