"""Exploration: many right answers, of which a rare kind pays more: "22=" -> "9+6+7" is fine, "4*5+2" is better."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from bandpo._input import InputError, check_number
from bandpo.lab.tasks.base import Row, table
from bandpo.lab.tasks.small import Problem, SmallTask, arithmetic, whole

if TYPE_CHECKING:
    from datasets import Dataset

LOW, HIGH = 10, 35


class Exploration(SmallTask):
    """Write a number from 10 to 35 with three or four digits and + - *; it pays more with a product in it.

    Few demonstrations multiply, so the answer that pays in full is one the model hardly ever gives: whether training
    finds it is the question. There are 26 problems, so training and evaluation ask the same ones.

    Args:
        plain_reward: what a right answer without a product pays; with one it pays 1.
        rare_share: share of the demonstrations that use operators at random; the others only add.
        train_size: number of training prompts before they repeat.

    Raises:
        InputError: a setting is out of range.
    """

    name = "exploration"
    alphabet = "0123456789+-*="
    prompt_length = 3
    answer_length = 7
    correct_share = 0.95
    warmup_steps = 1200
    holds_out = False
    eval_size = HIGH - LOW + 1

    def __init__(self, plain_reward: float = 0.3, rare_share: float = 0.12, train_size: int = 8192) -> None:
        self.plain_reward = check_number("task_args.plain_reward", plain_reward, 0, 1)
        self.rare_share = check_number("task_args.rare_share", rare_share, 0, 1, open_low=True)
        super().__init__(train_size)

    def sample(self, rng: Random) -> Problem:
        """A random number, with an answer that pays in full; see `SmallTask.sample`."""
        return self._problem(rng.randint(LOW, HIGH))

    def _problem(self, target: int) -> Problem:
        a, b = next((a, b) for b in range(2, 10) for a in range(9, 1, -1) if 1 <= target - a * b <= 9)
        return Problem(str(target), f"{target}=", f"{a}*{b}+{target - a * b}")

    def train_problem(self, rng: Random) -> Problem:
        """Any problem: none is held out; see `SmallTask.train_problem`."""
        return self.sample(rng)

    def eval_dataset(self, n: int) -> Dataset:
        """The first `n` of the 26 problems in an order of their own; see `Task.eval_dataset`.

        Raises:
            InputError: more than there are.
        """
        if whole("eval prompts", n, 1, argument="") > self.eval_size:
            raise InputError(
                f"eval prompts: got {n!r}; task 'exploration' has {self.eval_size}; take more samples of each"
            )
        targets = Random("eval").sample(range(LOW, HIGH + 1), n)
        problems = [self._problem(target) for target in targets]
        return table([{"prompt": p.question, "question": p.question, "answer": p.answer} for p in problems])

    def demonstration(self, rng: Random) -> tuple[str, str]:
        """A sum, rarely with other operators, of the value asked for or of another; see `SmallTask.demonstration`."""
        operators = "+-*" if rng.random() < self.rare_share else "+"
        while True:
            text = rng.choice("123456789")
            for _ in range(rng.choice((2, 3))):
                text += rng.choice(operators) + rng.choice("123456789")
            value = arithmetic(text) or 0
            if LOW <= value <= HIGH:
                break
        if rng.random() >= self.correct_share:
            value = rng.choice([other for other in range(LOW, HIGH + 1) if other != value])
        return f"{value}=", text

    def score(self, completion: str, row: Row) -> float:
        """1 for the right value with a product in it, `plain_reward` without one; see `Task.score`."""
        text = completion.strip()
        if not 3 <= sum(c.isdigit() for c in text) <= 4 or arithmetic(text) != int(str(row["question"]).rstrip("=")):
            return 0.0
        return 1.0 if "*" in text else self.plain_reward
