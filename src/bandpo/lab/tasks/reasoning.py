"""The procedural data sets of reasoning-gym as tasks, graded by their own scorers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from bandpo._input import InputError, nearest
from bandpo.lab.grading.process import shared
from bandpo.lab.grading.text import last_number, tagged
from bandpo.lab.tasks.base import Row, Task, held_out, table
from bandpo.lab.tasks.small import whole

if TYPE_CHECKING:
    from datasets import Dataset

EVAL_SEED = 2**30  # far from any seed a recipe would use; the split itself is by hash, not by seed
ANSWER_TAGS = "Give the final answer between <answer> and </answer>."


class ReasoningGym(Task):
    """Any data set of reasoning-gym.

    An answer counts when the data set's own scorer gives it full marks. The answer is what stands between
    <answer> tags, else the whole completion; where the right answer is a number, the last number in it (a sum that is
    only written down, not worked out, is no number).

    Problems are made where they are graded, in a process whose sets have one order: some data sets depend on it, and
    would hold out other problems in each run.

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
        /,
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
        if fixed := {"seed", "size"} & set(config):
            raise InputError(f"task_args.{min(fixed)}: not for you to set; use train_size and the recipe's seed")
        own = [name for name in inspect.signature(DATASETS[dataset][1]).parameters if name not in ("seed", "size")]
        takes = ["instruction", "chat", "train_size", *own]
        for key in config:
            if key not in own:
                raise InputError(
                    f"task {dataset!r} has no argument {key!r}{nearest(key, takes)}; it takes {', '.join(takes)}"
                )
        self.name = dataset
        self.instruction, self.chat, self.train_size = instruction, chat, whole("train_size", train_size, 1)
        self._config = config
        self._made: dict[tuple[int, int], Any] = {}
        # Scorers want the whole entry, whose metadata no table column holds: kept here, by where it came from.
        self._entries: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._places: dict[str, tuple[int, int, int]] = {}  # by question
        self._made[0, 1] = self._make(0, 1)  # the scorer, and proof that the settings will do

    def _make(self, seed: int, size: int) -> Any:
        try:
            return reasoning_gym.create_dataset(self.name, **{**self._config, "seed": seed, "size": size})
        except Exception as error:
            raise InputError(f"task_args: reasoning-gym's {self.name!r} refuses {self._config}: {error}") from error

    def _entry(self, seed: int, size: int, index: int) -> dict[str, Any]:
        if (seed, size) not in self._made:
            self._made[seed, size] = self._make(seed, size)
        entry: dict[str, Any] = self._made[seed, size][index]
        if entry["answer"] is None:  # of those with many right answers, some show one
            entry = {**entry, "answer": _example(entry["metadata"])}
        return entry

    def draw(self, seed: int, size: int, want_held_out: bool, n: int) -> list[dict[str, Any]]:
        """Make `n` problems of one side of the split, out of `size`; called in the process that grades.

        Held-out ones are all different. Each has question, answer and entry: where the problem came from.
        """
        rows: list[dict[str, Any]] = []
        seen: set[str] = set()
        for index in range(size):
            entry, place = self._entry(seed, size, index), (seed, size, index)
            question = entry["question"]
            if held_out(question) != want_held_out or (want_held_out and question in seen):
                continue
            seen.add(question)
            self._entries[place] = entry
            self._places[question] = place
            rows.append({"question": question, "answer": str(entry["answer"]), "entry": list(place)})
            if len(rows) == n:
                break
        return rows

    def train_dataset(self, seed: int) -> Dataset:
        """Problems drawn with `seed`, without the held-out ones; see `Task.train_dataset`."""
        return self._dataset(shared().call(self, "draw", seed, 2 * self.train_size + 100, False, self.train_size))

    def eval_dataset(self, n: int) -> Dataset:
        """Different held-out problems; see `Task.eval_dataset`.

        Raises:
            InputError: so many different ones were not found.
        """
        rows = shared().call(self, "draw", EVAL_SEED, 100 * n + 1000, True, n)
        if len(rows) == n:
            return self._dataset(rows)
        raise InputError(
            f"eval prompts: got {n!r}, but task {self.name!r} with {self._config} has about {len(rows)} different "
            "held-out problems; ask for no more, or make the task larger"
        )

    def _dataset(self, rows: list[dict[str, Any]]) -> Dataset:
        for row in rows:
            text = f"{row['question']}\n{self.instruction}" if self.instruction else row["question"]
            row["prompt"] = [{"role": "user", "content": text}] if self.chat else text
        return table(rows)

    def prepare(self, row: Row) -> bool:
        """Make the problem again from where it came from, in a process that has not seen it."""
        place = tuple(row.get("entry") or ())
        if not place or place in self._entries:
            return False
        self._entries[place] = self._entry(*place)  # type: ignore[arg-type, index]
        return True

    def score(self, completion: str, row: Row) -> float:
        """1 when the data set's scorer gives full marks, else 0; see `Task.score`."""
        place = tuple(row.get("entry") or self._places.get(row.get("question", "")) or ())
        bare = {"question": row.get("question", ""), "answer": row["answer"], "metadata": {}}
        entry = self._entries.get(place, bare)  # type: ignore[arg-type]
        text = _text(completion)
        candidates = {text, last_number(text) or text if _is_number(row["answer"]) else text}
        also = ALSO.get(self.name, _no_nan)
        return float(any(self._made[0, 1].score_answer(c, entry) == 1 and also(c, row["answer"]) for c in candidates))

    def gold(self, row: Row) -> str:
        """The answer; "" where the data set shows none, or only an integral not worked out; see `Task.gold`."""
        return "" if "Integral(" in row["answer"] else str(row["answer"])

    def final_answer(self, completion: str) -> str:
        """What stands between the answer tags, else the last number, else the whole; see `Task.final_answer`."""
        text = _text(completion)
        return text if tagged(completion) else last_number(text) or text

    def __getstate__(self) -> dict[str, Any]:
        """Without the problems, which the process that grades makes itself."""
        return {**super().__getstate__(), "_made": {}, "_entries": {}, "_places": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the scorer anew: not every one can be sent."""
        self.__dict__.update(state)
        self._made[0, 1] = self._make(0, 1)


def _text(completion: str) -> str:
    found = tagged(completion)
    return completion.strip() if found is None else found


def _is_number(text: str) -> bool:
    try:
        return Decimal(text.replace(",", "")).is_finite()
    except InvalidOperation:
        return False


def _no_nan(text: str, answer: str) -> bool:
    """Not a number is never right, though a distance of nan is below every limit (complex_arithmetic)."""
    return not NAN.search(text) or bool(NAN.search(answer))


def _close(text: str, answer: str) -> bool:
    """Within 1e-4 and 1 % (coin_flip), not just the same first digits, for which "0" would do."""
    top, _, bottom = text.partition("/")
    return abs(float(top) / float(bottom or 1) - float(answer)) <= min(1e-4, 0.01 * abs(float(answer)))


def _same(text: str, answer: str) -> bool:
    """The same word (game_of_life_halting), not just any word."""
    return text.lower() == answer.lower()


NAN = re.compile(r"(?<![a-z])(nan|inf(inity)?)(?![a-z])|nanj", re.IGNORECASE)
# What must hold besides full marks from a scorer that gives them to wrong answers.
ALSO: dict[str, Callable[[str, str], bool]] = {"coin_flip": _close, "game_of_life_halting": _same}


def _example(metadata: Mapping[str, Any]) -> str:
    for key in ("example_answer", "example_correct_answer"):
        if key in metadata:
            return str(metadata[key])
    return json.dumps(metadata["possible_answer"]) if "possible_answer" in metadata else ""
