"""What a task is: problems to ask, problems held out, and a grader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from bandpo.lab.grading.text import Completion, answer_text

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
"""A problem: its columns "prompt", "question", "answer" and what else the task puts beside them."""


def held_out(key: str, share: int = 8) -> bool:
    """Whether the problem `key` belongs to the held-out split: one problem in `share`, by a hash of the problem.

    Args:
        key: what makes two problems the same one.
        share: one problem in this many is held out.

    Returns:
        True for a held-out problem, on every machine and in every run.
    """
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") % share == 0


def table(rows: Sequence[Row]) -> Dataset:
    """A dataset of problems, which all have the same columns."""
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


class Task(ABC):
    """A task whose answers can be checked: what to ask, and how good an answer is.

    A task of one's own has these three methods, and stands in a file of its own: `task: path/to/file.py:MyTask`.
    Nothing of what `score` needs may change after the task is made: it is sent once to the process that grades.

    Attributes:
        name: of the task, for reports; the class's own name unless given.
        grading: where `score` runs. "sealed", the default: in a process of its own, with a time limit for each answer,
            that may neither run text as code, nor write files, start processes or use the network. "timed": the same
            without the seal. "direct": in the trainer's process, for graders that only compare strings.
        time_limit: seconds for one answer; an answer that takes longer scores 0.
        answer_tokens: room that an answer needs; where `bandpo eval` stops by default.
        eval_size: how many held-out problems there are, when they are few; None for as many as one wants.
        holds_out: False for a task that trains and evaluates on the same problems.
        failures: answers that could not be graded, which scored 0, by reason.
    """

    name: str
    grading: Literal["sealed", "timed", "direct"] = "sealed"
    time_limit: float = 5.0
    answer_tokens: int = 512
    eval_size: int | None = None
    holds_out: bool = True

    def __init_subclass__(cls, **named: Any) -> None:
        """Name the class after itself unless it has a name."""
        super().__init_subclass__(**named)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @abstractmethod
    def train_dataset(self, seed: int) -> Dataset:
        """Training problems, none of them held out.

        Args:
            seed: which problems, and in which order.

        Returns:
            A dataset with the columns prompt (text, or chat messages), question (the bare problem, which names it) and
            answer (the right one). More columns reach `score`.
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
    def score(self, completion: str, row: Row) -> float:
        """How good a completion is: the reward. What it raises counts as 0 and is kept in `failures`.

        Args:
            completion: what the model wrote: data, never to be run.
            row: the problem, with the dataset's columns.

        Returns:
            1 for a right answer, 0 for a wrong one; between them where there are degrees.
        """

    def gold(self, row: Row) -> str:
        """A completion that scores 1.

        Args:
            row: the problem.

        Returns:
            The answer, unless the task says otherwise.
        """
        return str(row["answer"])

    def prepare(self, row: Row) -> bool:
        """Make ready, outside the time limit and the seal, what grading this problem needs.

        Args:
            row: the problem.

        Returns:
            Whether anything was made.
        """
        return False

    def final_answer(self, completion: str) -> str:
        """What a completion answers, as maj@k counts it; reading only, nothing is evaluated.

        Args:
            completion: what the model wrote.

        Returns:
            The answer; "" for none.
        """
        return completion.strip()

    @property
    def failures(self) -> Counter[str]:
        """Answers that could not be graded, by reason."""
        counts: Counter[str] = self.__dict__.setdefault("_failures", Counter())
        return counts

    def correct(self, completion: Completion, answer: str, question: str = "", **columns: Any) -> bool:
        """Whether a completion is fully right.

        Args:
            completion: text, or chat messages.
            answer: the right answer, from the dataset.
            question: the problem, from the dataset.
            **columns: the dataset's other columns.

        Returns:
            True when its score is 1.
        """
        return self.reward([completion], [answer], question=[question], **{k: [v] for k, v in columns.items()})[0] >= 1

    def reward(self, completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
        """The scores of completions: a reward function as TRL takes it. May be called from any thread.

        Args:
            completions: one per sample, text or chat messages.
            answer: the right answer of each.
            **columns: the dataset's other columns, which `score` gets, and what else TRL passes.

        Returns:
            One reward per completion.

        Raises:
            InputError: the task cannot be sent to the process that grades.
        """
        from bandpo.lab.grading import grade

        kept = {key: values for key, values in columns.items() if _is_column(key, values, len(answer))}
        rows = [{"answer": gold, **{key: kept[key][i] for key in kept}} for i, gold in enumerate(answer)]
        grades = grade(self, [answer_text(c) for c in completions], rows)
        if log_metric := columns.get("log_metric"):  # TRL's own way for a reward function to log
            log_metric("grading/failed", sum(bool(g.why) for g in grades) / max(len(grades), 1))
        return [g.score for g in grades]

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: all but what belongs to this one."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_failures", "_key")}


PASSED_BY_TRL = ("prompts", "completions", "completion_ids", "environments", "trainer_state")


def _is_column(key: str, values: Any, n: int) -> bool:
    """Whether a keyword is a column of the dataset: one plain value for each completion."""
    plain = (str, int, float, bool, type(None), list, dict)
    whole = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == n
    return whole and key not in PASSED_BY_TRL and all(isinstance(value, plain) for value in values)
