"""The procedural data sets of reasoning-gym as tasks, graded by their own scorers."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

import math_verify
import reasoning_gym
from datasets import Dataset
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from bandpo._input import InputError, check_keywords, nearest
from bandpo.train.tasks import Task, held_out

EVAL_SEED = 2**30  # far from any seed a recipe would use; the split itself is by hash, not by seed
ANSWER_TAGS = "Give the final answer between <answer> and </answer>."


class ReasoningGym(Task):
    """Any data set of reasoning-gym.

    An answer counts when the data set's own scorer gives it full marks. The answer is what stands between
    <answer> tags, else the whole completion; where the right answer is a number, the last number in it, found by
    math-verify (a sum that is only written down, not worked out, is no number).

    Args:
        dataset: name of the data set.
        instruction: added to each question on a line of its own; "" adds nothing.
        chat: whether a prompt is a chat message (instruct models) or plain text.
        train_size: number of training problems before they repeat.
        **config: the data set's own settings.

    Raises:
        InputError: unknown data set or setting, or a value that the data set refuses.
    """

    def __init__(
        self,
        dataset: str,
        instruction: str = ANSWER_TAGS,
        chat: bool = True,
        train_size: int = 2048,
        **config: Any,
    ) -> None:
        if dataset not in DATASETS:
            raise InputError(
                f"task: reasoning-gym has no data set {dataset!r}{nearest(dataset, DATASETS)}; it has {len(DATASETS)}, "
                "listed by python -c 'from reasoning_gym.factory import DATASETS; print(*DATASETS)'"
            )
        if not isinstance(train_size, int) or train_size < 1:
            raise InputError(f"task_args.train_size: got {train_size!r}; give a whole number from 1")
        check_keywords(f"task {dataset!r}", DATASETS[dataset][1], config)
        if fixed := {"seed", "size"} & set(config):
            raise InputError(f"task_args.{min(fixed)}: not for you to set; use train_size and the recipe's seed")
        self.name = dataset
        self.instruction, self.chat, self.train_size = instruction, chat, train_size
        self._config = config
        # Scorers want the whole entry, whose metadata no table column holds: kept here, found again by its question.
        self._entries: dict[str, dict[str, Any]] = {}
        self._scorer = self._make(seed=0, size=1)

    def _make(self, seed: int, size: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self.name, **{**self._config, "seed": seed, "size": size})
        except (AssertionError, ValueError, TypeError) as error:
            raise InputError(f"task_args: reasoning-gym's {self.name!r} refuses {self._config}: {error}") from error

    def _draw(self, seed: int, most: int, want_held_out: bool) -> Iterator[dict[str, Any]]:
        data = self._make(seed=seed, size=most)
        for index in range(most):
            entry = data[index]
            if held_out(entry["question"]) == want_held_out:
                yield entry

    def train_dataset(self, seed: int) -> Dataset:
        """Problems drawn with `seed`, without the held-out ones; see `Task.train_dataset`."""
        drawn = self._draw(seed, 2 * self.train_size + 100, want_held_out=False)
        return self._dataset(list(islice(drawn, self.train_size)))

    def eval_dataset(self, n: int) -> Dataset:
        """Different held-out problems; see `Task.eval_dataset`.

        Raises:
            InputError: so many different ones were not found.
        """
        found: dict[str, dict[str, Any]] = {}
        for entry in self._draw(EVAL_SEED, 100 * n + 1000, want_held_out=True):
            found.setdefault(entry["question"], entry)
            if len(found) >= n:
                return self._dataset(list(found.values()))
        raise InputError(
            f"eval prompts: got {n!r}, but task {self.name!r} with {self._config} has about {len(found)} different "
            "held-out problems; ask for no more, or make the task larger"
        )

    def _dataset(self, entries: list[dict[str, Any]]) -> Dataset:
        self._entries.update({entry["question"]: entry for entry in entries})
        questions = [entry["question"] for entry in entries]
        texts = [f"{question}\n{self.instruction}" if self.instruction else question for question in questions]
        prompts = [[{"role": "user", "content": text}] for text in texts] if self.chat else texts
        answers = [str(entry["answer"]) for entry in entries]
        return Dataset.from_dict({"prompt": prompts, "question": questions, "answer": answers})

    def correct(self, completion: str, answer: str, question: str = "") -> bool:
        """Whether the data set's scorer gives full marks; see `Task.correct`."""
        entry = self._entries.get(question, {"question": question, "answer": answer, "metadata": {}})
        tagged = extract_answer(completion)
        text = completion.strip() if tagged is None else tagged
        candidates = [text]
        if _is_number(answer):
            candidates += _last_number(text)
        return any(self._scorer.score_answer(candidate, entry) == 1.0 for candidate in candidates)


class ChainSum(ReasoningGym):
    """Sums and differences of a few numbers: "4 + 3 - 1 =".

    Args:
        instruction: added to each question on a line of its own; "" adds nothing.
        chat: whether a prompt is a chat message (instruct models) or plain text.
        train_size: number of training problems before they repeat.
        min_terms: fewest numbers in a problem.
        max_terms: most numbers in a problem.
        min_digits: fewest digits of a number.
        max_digits: most digits of a number.
        allow_negation: whether numbers may be negative.
    """

    def __init__(
        self,
        instruction: str = "",
        chat: bool = True,
        train_size: int = 2048,
        min_terms: int = 2,
        max_terms: int = 2,
        min_digits: int = 1,
        max_digits: int = 1,
        allow_negation: bool = False,
    ) -> None:
        super().__init__(
            "chain_sum",
            instruction=instruction,
            chat=chat,
            train_size=train_size,
            min_terms=min_terms,
            max_terms=max_terms,
            min_digits=min_digits,
            max_digits=max_digits,
            allow_negation=allow_negation,
        )


def _is_number(text: str) -> bool:
    try:
        return Decimal(text.replace(",", "")).is_finite()
    except InvalidOperation:
        return False


def _last_number(text: str) -> list[str]:
    parsed = math_verify.parse(text)
    return [str(parsed[0])] if parsed and getattr(parsed[0], "is_Number", False) else []
