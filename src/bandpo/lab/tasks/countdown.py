"""Countdown: make a number out of digits, each used once: "357|22=" -> "3*5+7"."""

from __future__ import annotations

from random import Random

from bandpo.lab.tasks.base import Row
from bandpo.lab.tasks.small import Problem, SmallTask, arithmetic, whole

OPERATORS = "+-*"


class Countdown(SmallTask):
    """A calculation with + - * that uses each of the given digits once and has the given value, 1 to 99.

    Most problems have several answers, and each counts. Problems with the same digits and value, in whatever order,
    fall on the same side of the split.

    Args:
        numbers: how many digits, 3 or 4.
        train_size: number of training prompts before they repeat.

    Raises:
        InputError: a setting is out of range.
    """

    name = "countdown"
    alphabet = "0123456789+-*|="
    correct_share = 0.3
    warmup_steps = 1500

    def __init__(self, numbers: int = 3, train_size: int = 8192) -> None:
        self.numbers = whole("numbers", numbers, 3, 4)
        self.prompt_length, self.answer_length = numbers + 4, 2 * numbers - 1
        super().__init__(train_size)

    def sample(self, rng: Random) -> Problem:
        """Random digits, and the value of a random calculation with them; see `SmallTask.sample`."""
        while True:
            digits = "".join(rng.choice("123456789") for _ in range(self.numbers))
            answer = self._calculation(digits, rng)
            value = arithmetic(answer) or 0
            if 1 <= value <= 99:
                return Problem(f"{''.join(sorted(digits))}|{value}", f"{digits}|{value:02}=", answer)

    def _calculation(self, digits: str, rng: Random) -> str:
        """The digits in a random order, joined by random operators."""
        order = rng.sample(digits, len(digits))
        return order[0] + "".join(rng.choice(OPERATORS) + digit for digit in order[1:])

    def demonstration(self, rng: Random) -> tuple[str, str]:
        """An answer, or a calculation with the same digits and another value; see `SmallTask.demonstration`."""
        problem = self.train_problem(rng)
        if rng.random() < self.correct_share:
            return problem.question, problem.answer
        digits, value = problem.question[: self.numbers], arithmetic(problem.answer)
        for _ in range(50):  # three ones make only few values
            wrong = self._calculation(digits, rng)
            if arithmetic(wrong) != value:
                break
        return problem.question, wrong

    def score(self, completion: str, row: Row) -> float:
        """1 when the completion uses each digit once and has the value; see `Task.score`."""
        text = completion.strip()
        digits, _, value = str(row["question"]).rstrip("=").partition("|")
        used = sorted(c for c in text if c.isdigit())
        return float(used == sorted(digits) and arithmetic(text) == int(value))
