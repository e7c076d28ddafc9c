"""The reward function that verl's reward workers load: the recipe's rewards, and the task's own grader beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from threading import Lock
from typing import Any

_lock = Lock()  # verl calls from several threads, and a task is made once


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    task: str,
    task_args: str,
    rewards: str = "[null, null]",
    **_: Any,
) -> dict[str, Any]:
    """Reward a completion as the recipe says, and grade it as the task does.

    Args:
        data_source: the data's name; the task is named by `task`.
        solution_str: what the model wrote.
        ground_truth: the right answer.
        extra_info: the data's own; "question" names the problem, "columns" holds the task's further columns, JSON.
        task: name of the task.
        task_args: the task's settings, JSON.
        rewards: reward_funcs and reward_weights of the recipe, JSON.
        **_: what verl passes to every reward function.

    Returns:
        score (the reward), acc (the task's own score) and the question, which verl writes beside each sample.
    """
    told = extra_info or {}
    question = str(told.get("question", ""))
    columns = {"question": question, **json.loads(told.get("columns") or "{}")}
    with _lock:
        grade, reward = _graders(task, task_args, rewards)
    named = {"completions": [solution_str], "answer": [ground_truth], **{key: [x] for key, x in columns.items()}}
    acc = grade(**named)[0]
    return {"score": acc if reward is None else reward(**named)[0], "acc": acc, "question": question}


@lru_cache(maxsize=4)
def _graders(task: str, task_args: str, rewards: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The task's own score, and the recipe's reward where that is another one."""
    from bandpo.lab.rewards import one_reward, reward_functions, reward_weights
    from bandpo.lab.tasks import get_task

    made = get_task(task, **json.loads(task_args))
    names, weights = json.loads(rewards)
    if names is None:
        return made.reward, None
    return made.reward, one_reward(reward_functions(made, names), reward_weights(names, weights))
