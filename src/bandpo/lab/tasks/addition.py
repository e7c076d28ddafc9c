"""Addition of two numbers with the same number of digits: "217+384=" -> "0601". Needs no data and no library."""

from __future__ import annotations

from random import Random

from bandpo.lab.tasks.small import Problem, SmallTask, one_wrong, whole


class Addition(SmallTask):
    """Exact addition, graded on the whole answer, which has one digit more than the numbers: "0601", "1203".

    Without the leading 0 a small model has to guess the length of the sum first, and learns far more slowly.
    A problem and its mirror image (a+b, b+a) fall on the same side of the split.

    Args:
        digits: digits of each number, 1 to 6. The first digit is never 0, except with one digit.
        train_size: number of training prompts before they repeat.

    Raises:
        InputError: a setting is out of range.
    """

    name = "addition"
    alphabet = "0123456789+="

    def __init__(self, digits: int = 3, train_size: int = 8192) -> None:
        self.digits = whole("digits", digits, 1, 6)
        self.prompt_length, self.answer_length = 2 * digits + 2, digits + 1
        super().__init__(train_size)

    def sample(self, rng: Random) -> Problem:
        """Two random numbers; see `SmallTask.sample`."""
        low, high = (0, 9) if self.digits == 1 else (10 ** (self.digits - 1), 10**self.digits - 1)
        a, b = rng.randint(low, high), rng.randint(low, high)
        return Problem(f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", str(a + b).zfill(self.digits + 1))

    def demonstration(self, rng: Random) -> tuple[str, str]:
        """The sum, or the sum with one wrong digit; see `SmallTask.demonstration`."""
        problem = self.train_problem(rng)
        right = rng.random() < self.correct_share
        return problem.question, problem.answer if right else one_wrong(problem.answer, "0123456789", rng)
