"""Verifiable tasks: prompts, held-out prompts, and a grader.

A new task is one file with one `Task` subclass, and one row in `registry.TASKS`.
"""

from bandpo.lab.grading.text import Completion, answer_text
from bandpo.lab.tasks.base import Row, Task, held_out, table
from bandpo.lab.tasks.check import check_task
from bandpo.lab.tasks.registry import get_task, list_tasks
from bandpo.lab.tasks.small import SmallTask

__all__ = [
    "Completion",
    "Row",
    "SmallTask",
    "Task",
    "answer_text",
    "check_task",
    "get_task",
    "held_out",
    "list_tasks",
    "table",
]
