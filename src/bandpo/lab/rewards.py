"""What a training rewards: the task's own score, functions and reward models, as TRL's `reward_funcs` names them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError, is_import_path, load_object, nearest
from bandpo.lab.tasks.registry import announce

if TYPE_CHECKING:
    from bandpo.lab.tasks import Task

Reward = Callable[..., Any]
"""A reward function as TRL takes it: `completions`, the dataset's columns and more by name; a number for each."""

TASK = "task"
TRLS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def reward_functions(task: Task, names: Sequence[str] | None = None) -> list[Reward | str]:
    """The rewards that a recipe names, as TRL's trainer takes them.

    Args:
        task: whose score "task" is.
        names: each "task"; one of TRL's own, `accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`;
            "path/to/file.py:function" or "package.module:function", which is announced before its code runs; or a
            reward model, by its folder or Hub name. None for the task's score alone.

    Returns:
        Functions, and names of reward models.

    Raises:
        InputError: there is no such reward, or it is no function.
    """
    return [_one(task, name) for name in names or [TASK]]


def _one(task: Task, name: str) -> Reward | str:
    if name == TASK:
        return task.reward
    if name in TRLS:
        import trl.rewards

        return _with_solution(getattr(trl.rewards, name))
    if is_import_path(name):
        announce("reward_funcs", name)
        function = load_object(name, "reward_funcs")
        if not callable(function) or isinstance(function, type):
            raise InputError(
                f"reward_funcs={name!r}: is {function!r}; must be a function that takes completions by name"
            )
        return function  # type: ignore[no-any-return]
    if "/" in name or Path(name).is_dir():
        return name
    raise InputError(
        f"reward_funcs={name!r}: not known{nearest(name, (TASK, *TRLS))}; use {', '.join((TASK, *TRLS))}, a function "
        "as path/to/file.py:name, or a reward model's folder or Hub name"
    )


def _with_solution(function: Reward) -> Reward:
    """TRL's own compare with the column "solution", which is our "answer"."""

    @functools.wraps(function)
    def reward(**named: Any) -> Any:
        return function(**{"solution": named.get("answer"), **named})

    return reward


def reward_weights(names: Sequence[str] | None, weights: Sequence[float] | None) -> list[float]:
    """The weight of each reward.

    Args:
        names: as in `reward_functions`.
        weights: one per name; None for 1 each.

    Returns:
        The weights.

    Raises:
        InputError: another number of weights than of names, or one that is not finite.
    """
    names = names or [TASK]
    found = [1.0] * len(names) if weights is None else list(weights)
    if len(found) != len(names) or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in found):
        raise InputError(
            f"reward_weights={weights!r}: must be {len(names)} finite numbers, one for each of reward_funcs"
        )
    return [float(w) for w in found]


def one_reward(functions: Sequence[Reward | str], weights: Sequence[float]) -> Callable[..., list[float]]:
    """The weighted sum of several rewards, for engines that take one function.

    Args:
        functions: from `reward_functions`.
        weights: from `reward_weights`.

    Returns:
        ``f(completions=..., **columns)``, with one value per completion in each column; gives one number per
        completion. A reward of None counts as 0, as in TRL.

    Raises:
        InputError: a reward model, which such an engine runs itself; when called, a function that gives another number
            of rewards.
    """
    for function in functions:
        if isinstance(function, str):
            raise InputError(
                f"reward_funcs={function!r}: is a reward model, which verl runs by keys of its own; set its "
                "reward_model keys under 'verl:', or leave it out"
            )

    def reward(*, completions: Sequence[Any], **columns: Any) -> list[float]:
        total = [0.0] * len(completions)
        for function, weight in zip(functions, weights, strict=True):
            assert not isinstance(function, str)
            found = _called(function, completions=completions, **columns)
            total = [t + weight * (x or 0.0) for t, x in zip(total, found, strict=True)]
        return total

    return reward


def _called(function: Reward, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
    found = function(completions=completions, **columns)
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    found = list(found)
    if len(found) != len(completions):
        name = getattr(function, "__name__", function)
        raise InputError(
            f"reward_funcs: {name} gives {len(found)} rewards for {len(completions)} completions; give one each"
        )
    return found
