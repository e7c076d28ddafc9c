"""Tasks by name: one row a task."""

from __future__ import annotations

import logging
from typing import Any

from bandpo._input import InputError, check_keywords, is_import_path, load_object, nearest
from bandpo.lab.tasks.base import Task

GYM_PREFIX = "reasoning-gym:"
CHAIN_SUM = {"instruction": "", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}

# Import paths, so that a task costs nothing until it is used: reasoning-gym takes seconds.
TASKS = {
    "addition": "bandpo.lab.tasks.addition:Addition",
    "countdown": "bandpo.lab.tasks.countdown:Countdown",
    "exploration": "bandpo.lab.tasks.exploration:Exploration",
    "reverse_text": "bandpo.lab.tasks.reverse_text:ReverseText",
    "chain_sum": f"{GYM_PREFIX}chain_sum",  # sums of two digits: CHAIN_SUM
    "jsonl": "bandpo.lab.tasks.jsonl:Jsonl",
}
_announced: set[str] = set()


def list_tasks() -> list[str]:
    """The names of the tasks that come with bandpo.

    Returns:
        The names; beside them there are the data sets of reasoning-gym and tasks of one's own.
    """
    return list(TASKS)


def get_task(name: str, **task_args: Any) -> Task:
    """The task of that name.

    Args:
        name: one of `list_tasks()`; "reasoning-gym:NAME" for a data set of reasoning-gym; "path/to/file.py:MyTask" or
            "package.module:MyTask" for a task of one's own, which is announced before its code runs.
        **task_args: the task's own settings, by name.

    Returns:
        The task.

    Raises:
        InputError: no task of that name, or it has no such setting, or the value is out of range.
    """
    key = name.replace("-", "_") if isinstance(name, str) else ""
    path = TASKS.get(key, name)
    if key and path.startswith(GYM_PREFIX):
        from bandpo.lab.tasks.reasoning import ReasoningGym

        settings = CHAIN_SUM if key == "chain_sum" else {}
        return ReasoningGym(path.removeprefix(GYM_PREFIX), **{**settings, **task_args})
    if key in TASKS:
        kind = load_object(path, "task")
    elif key and is_import_path(name):
        announce("task", name)
        kind = load_object(name, "task")
    else:
        raise InputError(
            f"task={name!r}: not known{nearest(name, TASKS)}; use {', '.join(TASKS)}, {GYM_PREFIX}NAME, or one of your "
            "own as path/to/file.py:MyTask or package.module:MyTask"
        )
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise InputError(f"task={name!r}: is {kind!r}; must be a subclass of bandpo.lab.tasks.Task")
    check_keywords(f"task {name!r}", kind, task_args)
    return _made(name, kind, task_args)


def _made(name: str, kind: type[Task], task_args: dict[str, Any]) -> Task:
    try:
        return kind(**task_args)
    except InputError:
        raise
    except Exception as error:  # a task of one's own may raise anything
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"task {name!r}: cannot be made with task_args={task_args!r}: {what}") from error


def announce(what: str, path: str) -> None:
    """Say, once, that the code behind an import path is about to run; `what` is the setting that names it."""
    if path not in _announced:
        _announced.add(path)
        logging.getLogger("bandpo").warning("%s %r: running its code", what, path[:200])
