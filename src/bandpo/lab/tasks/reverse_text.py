"""Reverse a text: "hdbaek=" -> "keabdh"."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from bandpo.lab.tasks.small import Problem, SmallTask, one_wrong, whole


class ReverseText(SmallTask):
    """Write random letters backwards.

    Args:
        length: number of letters, 2 to 12.
        letters: number of different letters, 2 to 26.
        train_size: number of training prompts before they repeat.

    Raises:
        InputError: a setting is out of range.
    """

    name = "reverse_text"
    warmup_steps = 900

    def __init__(self, length: int = 6, letters: int = 26, train_size: int = 8192) -> None:
        self.length = whole("length", length, 2, 12)
        self.letters = ascii_lowercase[: whole("letters", letters, 2, 26)]
        self.alphabet = self.letters + "="
        self.prompt_length, self.answer_length = length + 1, length
        super().__init__(train_size)

    def sample(self, rng: Random) -> Problem:
        """Random letters; see `SmallTask.sample`."""
        text = "".join(rng.choice(self.letters) for _ in range(self.length))
        return Problem(text, f"{text}=", text[::-1])

    def demonstration(self, rng: Random) -> tuple[str, str]:
        """The text reversed, or that with one wrong letter; see `SmallTask.demonstration`."""
        problem = self.train_problem(rng)
        right = rng.random() < self.correct_share
        return problem.question, problem.answer if right else one_wrong(problem.answer, self.letters, rng)
