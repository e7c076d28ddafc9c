"""Tasks for the tiny model: one character a token, prompts of one length, demonstrations for its warm-up."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from bandpo._input import InputError
from bandpo.lab.tasks.base import Row, Task, held_out, table

if TYPE_CHECKING:
    from datasets import Dataset

EVAL_SEED = 0
PATIENCE = 20_000  # draws without a new problem after which there are no more


class Problem(NamedTuple):
    """A problem of a small task.

    Args:
        key: what makes two problems the same one; decides whether it is held out.
        question: the prompt.
        answer: a right answer.
    """

    key: str
    question: str
    answer: str


class SmallTask(Task):
    """A task that a model of 100,000 parameters learns in a minute.

    Args:
        train_size: number of training prompts before they repeat.

    Attributes:
        alphabet: every character of prompts and answers.
        prompt_length: characters of every prompt.
        answer_length: most characters of an answer.
        correct_share: share of the demonstrations that is right. The rest leaves the model unsure, so that sampling
            finds right and wrong answers to most problems: what reinforcement learning needs to start from.
        warmup_steps: updates of 256 demonstrations that give a model to start from.
    """

    grading = "direct"
    alphabet: str
    prompt_length: int
    answer_length: int
    correct_share: float = 0.4
    warmup_steps: int = 600

    def __init__(self, train_size: int = 8192) -> None:
        self.train_size = whole("train_size", train_size, 1)
        self.answer_tokens = self.answer_length + 1

    @abstractmethod
    def sample(self, rng: Random) -> Problem:
        """A random problem, held out or not."""

    @abstractmethod
    def demonstration(self, rng: Random) -> tuple[str, str]:
        """The prompt of a training problem, and an answer to imitate, right with probability `correct_share`."""

    def draw(self, rng: Random, keep: Callable[[str], bool]) -> Problem:
        """A random problem whose key `keep` accepts; InputError where there seems to be none."""
        for _ in range(PATIENCE):
            problem = self.sample(rng)
            if keep(problem.key):
                return problem
        raise InputError(f"task {self.name!r}: no such problem in {PATIENCE} draws; make the task larger")

    def train_problem(self, rng: Random) -> Problem:
        """A random problem that is not held out."""
        return self.draw(rng, keep=lambda key: not held_out(key))

    def train_dataset(self, seed: int) -> Dataset:
        """Random problems that are not held out; see `Task.train_dataset`."""
        rng = Random(f"train {seed}")
        return _table([self.train_problem(rng) for _ in range(self.train_size)])

    def eval_dataset(self, n: int) -> Dataset:
        """Different held-out problems; see `Task.eval_dataset`.

        Raises:
            InputError: so many do not exist.
        """
        rng = Random(f"eval {EVAL_SEED}")
        found: dict[str, Problem] = {}
        try:
            while len(found) < whole("eval prompts", n, 1, 100_000, argument=""):
                problem = self.draw(rng, keep=lambda key: held_out(key) and key not in found)
                found[problem.key] = problem
        except InputError:
            raise InputError(
                f"eval prompts: got {n!r}; task {self.name!r} with these settings has about {len(found)} "
                "held-out problems"
            ) from None
        return _table(list(found.values()))

    def score(self, completion: str, row: Row) -> float:
        """1 when the completion is the answer and nothing else; see `Task.score`."""
        return float(completion.strip() == row["answer"])


def _table(problems: list[Problem]) -> Dataset:
    return table([{"prompt": p.question, "question": p.question, "answer": p.answer} for p in problems])


def one_wrong(text: str, characters: str, rng: Random) -> str:
    """A text with one character replaced by another one of `characters`."""
    place = rng.randrange(len(text))
    return text[:place] + rng.choice([c for c in characters if c != text[place]]) + text[place + 1 :]


def whole(name: str, value: object, low: int, high: int | None = None, argument: str = "task_args.") -> int:
    """The value of a setting that must be a whole number from `low` to `high`; InputError where it is not."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
        return value
    until = "" if high is None else f" to {high}"
    raise InputError(f"{argument}{name}: got {value!r}; give a whole number from {low}{until}")


EXPRESSION = re.compile(r"[0-9](?:[-+*][0-9])*")


def arithmetic(text: str) -> int | None:
    """The value of digits joined by + - *, products first, such as "3*5+7"; None when the text is anything else."""
    if len(text) > 99 or not EXPRESSION.fullmatch(text):
        return None
    total = 0
    for term in re.findall(r"[-+]?[^-+]+", text):
        product = -1 if term[0] == "-" else 1
        for digit in term.lstrip("-+").split("*"):
            product *= int(digit)
        total += product
    return total
