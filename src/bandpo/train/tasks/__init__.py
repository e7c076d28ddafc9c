"""Verifiable tasks: prompts, held-out prompts, and a grader that is either right or wrong.

A new task is one file with one `Task` subclass, and one line in `get_task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from datasets import Dataset

from bandpo._input import InputError, check_keywords, nearest

Completion = str | list[dict[str, str]]

GYM_PREFIX = "reasoning-gym:"


def held_out(key: str, share: int = 8) -> bool:
    """Whether the problem `key` belongs to the held-out split: one problem in `share`, by a hash of the problem.

    Args:
        key: what makes two problems the same one.
        share: one problem in this many is held out.

    Returns:
        True for a held-out problem, on every machine and in every run.
    """
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % share == 0


def completion_text(completion: Completion) -> str:
    """The text of a completion as TRL hands it to a reward function: a string, or chat messages."""
    return completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)


class Task(ABC):
    """A task whose answers can be checked: what to ask, and whether an answer is right.

    The datasets have the columns "prompt" (text, or chat messages), "question" (the bare problem, which names it) and
    "answer" (the right one). `reward` is a reward function as TRL takes it.
    """

    name: str

    @abstractmethod
    def train_dataset(self, seed: int) -> Dataset:
        """Training problems, none of them held out.

        Args:
            seed: which problems, and in which order.

        Returns:
            A dataset with the columns prompt, question, answer.
        """

    @abstractmethod
    def eval_dataset(self, n: int) -> Dataset:
        """The first `n` held-out problems, always the same ones.

        Args:
            n: how many.

        Returns:
            A dataset with the columns prompt, question, answer.
        """

    @abstractmethod
    def correct(self, completion: str, answer: str, question: str = "") -> bool:
        """Whether a completion answers the problem.

        Args:
            completion: what the model wrote.
            answer: the right answer, from the dataset.
            question: the problem, from the dataset; only tasks with several right answers look at it.

        Returns:
            True when it is right.
        """

    def reward(self, completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
        """1 for a right completion, 0 for any other: a TRL reward function.

        Args:
            completions: one per sample, text or chat messages.
            answer: the right answer of each.
            **columns: the dataset's other columns and what else TRL passes; only "question" is read.

        Returns:
            One reward per completion.
        """
        questions = columns.get("question") or [""] * len(answer)
        rows = zip(completions, answer, questions, strict=True)
        return [float(self.correct(completion_text(text), gold, question)) for text, gold, question in rows]


def get_task(name: str, **task_args: Any) -> Task:
    """The task of that name.

    Args:
        name: "addition", "chain_sum", or "reasoning-gym:NAME" for any data set of reasoning-gym.
        **task_args: the task's own settings, by name.

    Returns:
        The task.

    Raises:
        InputError: no task of that name, or it has no such setting, or the value is out of range.
    """
    if name == "addition":
        from bandpo.train.tasks.addition import Addition

        check_keywords(f"task {name!r}", Addition, task_args)
        return Addition(**task_args)
    if name == "chain_sum" or name.startswith(GYM_PREFIX):
        # Imported only here: reasoning-gym takes seconds, and the demo does without it.
        from bandpo.train.tasks.reasoning import ChainSum, ReasoningGym

        if name != "chain_sum":
            return ReasoningGym(name.removeprefix(GYM_PREFIX), **task_args)
        check_keywords(f"task {name!r}", ChainSum, task_args)
        return ChainSum(**task_args)
    known = ("addition", "chain_sum")
    raise InputError(f"task={name!r}: not known{nearest(name, known)}; use {', '.join(known)} or {GYM_PREFIX}NAME")
