"""Addition of two numbers with the same number of digits: "217+384=" -> "0601". Needs no data and no library."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from datasets import Dataset

from bandpo._input import InputError
from bandpo.train.tasks import Task, held_out

EVAL_SEED = 0


class Addition(Task):
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

    def __init__(self, digits: int = 3, train_size: int = 8192) -> None:
        if not isinstance(digits, int) or not 1 <= digits <= 6:
            raise InputError(f"task_args.digits: got {digits!r}; give a whole number from 1 to 6")
        if not isinstance(train_size, int) or train_size < 1:
            raise InputError(f"task_args.train_size: got {train_size!r}; give a whole number from 1")
        self.digits = digits
        self.train_size = train_size

    def train_dataset(self, seed: int) -> Dataset:
        """Random problems that are not held out; see `Task.train_dataset`."""
        rng = Random(f"train {seed}")
        return self._dataset([self.draw(rng, keep=lambda key: not held_out(key)) for _ in range(self.train_size)])

    def eval_dataset(self, n: int) -> Dataset:
        """Different held-out problems; see `Task.eval_dataset`.

        Raises:
            InputError: so many do not exist.
        """
        numbers = 10 if self.digits == 1 else 9 * 10 ** (self.digits - 1)
        if not 1 <= n <= numbers**2 // 32:
            raise InputError(f"eval prompts: got {n!r}; addition with {self.digits} digits has 1 to {numbers**2 // 32}")
        rng = Random(f"eval {EVAL_SEED}")
        seen: set[str] = set()

        def fresh(key: str) -> bool:
            return held_out(key) and key not in seen

        pairs = []
        for _ in range(n):
            pairs.append(self.draw(rng, keep=fresh))
            seen.add(_key(*pairs[-1]))
        return self._dataset(pairs)

    def draw(self, rng: Random, keep: Callable[[str], bool]) -> tuple[int, int]:
        """Two random numbers whose problem `keep` accepts.

        Args:
            rng: the source of randomness.
            keep: whether to keep the problem with this key (the same one for a+b and b+a).

        Returns:
            The two numbers.
        """
        low, high = (0, 9) if self.digits == 1 else (10 ** (self.digits - 1), 10**self.digits - 1)
        while True:
            pair = rng.randint(low, high), rng.randint(low, high)
            if keep(_key(*pair)):
                return pair

    def problem(self, a: int, b: int) -> tuple[str, str]:
        """Question and answer for two numbers.

        Args:
            a: the first number.
            b: the second.

        Returns:
            The question, which is also the prompt, and the right answer.
        """
        return f"{a}+{b}=", str(a + b).zfill(self.digits + 1)

    def _dataset(self, pairs: list[tuple[int, int]]) -> Dataset:
        questions, answers = zip(*(self.problem(a, b) for a, b in pairs), strict=True)
        return Dataset.from_dict({"prompt": questions, "question": questions, "answer": answers})

    def correct(self, completion: str, answer: str, question: str = "") -> bool:
        """Whether the completion is the answer and nothing else; see `Task.correct`."""
        return completion.strip() == answer


def _key(a: int, b: int) -> str:
    return f"{min(a, b)}+{max(a, b)}"
