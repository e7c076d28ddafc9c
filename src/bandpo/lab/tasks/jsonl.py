"""Problems out of a file or a Hub data set, with a prompt and an answer in each row: GSM8K, MATH-500, AIME, AMC."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError, nearest
from bandpo.lab.grading.text import boxed, last_number, tagged
from bandpo.lab.tasks.base import Row, Task, held_out, table
from bandpo.lab.tasks.small import whole

if TYPE_CHECKING:
    from datasets import Dataset

PROMPTS = ("prompt", "question", "problem")
BOX = "Put the final answer in \\boxed{}."


class Jsonl(Task):
    r"""Problems with one right answer each, out of a file or a Hub data set.

    An answer is what stands in the last ``\boxed{}``, else between <answer> tags, else in the whole completion. It is
    right when it is the same text as the right answer or, with grader "math", when math-verify finds both equal.

    Args:
        test: held-out problems: a .jsonl, .json, .csv or .parquet file, or the name of a data set on the Hub.
        train: training problems, in the same way; those that are held out as well are left out. Without `test`, one
            problem in eight of `train` is held out.
        prompt: the field with the problem, text or chat messages; "prompt", "question" or "problem" when not given.
        answer: the field with the right answer. Of "... #### 18" (GSM8K) only what follows the last #### counts.
        grader: "math", "number" (the last number of the completion) or "exact" (the same text).
        instruction: added to each problem on a line of its own; asks for \boxed{} with grader "math".
        chat: whether a prompt is a chat message (instruct models) or plain text.
        system: a system message before each problem; only with `chat`.
        config: the Hub data set's configuration.
        test_split: the Hub data set's split for `test`.
        train_split: for `train`.

    Raises:
        InputError: a file or field is missing, a row cannot be used, or there is no such grader.
    """

    name = "jsonl"

    def __init__(
        self,
        test: str = "",
        train: str = "",
        prompt: str = "",
        answer: str = "answer",
        grader: str = "math",
        instruction: str | None = None,
        chat: bool = True,
        system: str = "",
        config: str | None = None,
        test_split: str = "test",
        train_split: str = "train",
    ) -> None:
        if not test and not train:
            raise InputError("task_args: task 'jsonl' needs test or train: a file or the name of a Hub data set")
        if grader not in GRADERS:
            raise InputError(f"task_args.grader: got {grader!r}{nearest(grader, GRADERS)}; use {', '.join(GRADERS)}")
        self.grading = "sealed" if grader == "math" else "direct"
        self.grader, self.fields = grader, (prompt, answer)
        self.instruction = (BOX if grader == "math" else "") if instruction is None else instruction
        self.chat, self.system = chat, system
        self.name = Path(test or train).stem if Path(test or train).suffix else test or train
        trained = self._read("train", train, config, train_split) if train else []
        tested = self._read("test", test, config, test_split) if test else []
        if not test:
            tested = [row for row in trained if held_out(row["question"])]
        asked = {row["question"] for row in tested}
        self._test, self._train = tested, [row for row in trained if row["question"] not in asked]
        if not self._test:
            raise InputError(f"task_args.train={train!r}: too few problems to hold one in eight out; give test as well")
        self.eval_size = len(self._test)

    def _read(self, argument: str, source: str, config: str | None, split: str) -> list[dict[str, Any]]:
        """The problems of a file or data set, each once, in order."""
        rows = _file_rows(argument, Path(source)) if _is_file(source) else _hub_rows(argument, source, config, split)
        found: dict[str, dict[str, Any]] = {}
        for where, row in rows:
            problem = self._problem(f"task_args.{argument}={source!r}, {where}", row)
            found.setdefault(problem["question"], problem)
        if not found:
            raise InputError(f"task_args.{argument}={source!r}: holds no row; give a file with problems")
        return list(found.values())

    def _problem(self, where: str, row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be an object with a prompt and an answer, not {type(row).__name__}")
        field = self.fields[0] or next((name for name in PROMPTS if name in row), PROMPTS[0])
        for argument, name in (("prompt", field), ("answer", self.fields[1])):
            if name not in row:
                raise InputError(
                    f"{where}: has no field {name!r}{nearest(name, row)}; it has {', '.join(map(str, row))}; "
                    f"name the right one with task_args.{argument}"
                )
        return {**self._prompt(where, row[field]), "answer": _answer(where, row[self.fields[1]])}

    def _prompt(self, where: str, asked: Any) -> dict[str, Any]:
        """The question, and the prompt made of it; chat messages are left as they are."""
        if (
            isinstance(asked, list)
            and asked
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in asked)
        ):
            return {"prompt": asked, "question": "\n".join(str(m["content"]) for m in asked)}
        if not isinstance(asked, str) or not asked.strip():
            raise InputError(f"{where}: the prompt is {asked!r}; must be text, or chat messages with role and content")
        text = f"{asked}\n{self.instruction}" if self.instruction else asked
        if not self.chat:
            return {"prompt": text, "question": asked}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"prompt": [*system, {"role": "user", "content": text}], "question": asked}

    def train_dataset(self, seed: int) -> Dataset:
        """The training problems, in an order of the seed's; see `Task.train_dataset`.

        Raises:
            InputError: there are none.
        """
        if not self._train:
            raise InputError("task_args: task 'jsonl' has no training problem; give train, other problems than test's")
        return table(Random(f"train {seed}").sample(self._train, len(self._train)))

    def eval_dataset(self, n: int) -> Dataset:
        """The first `n` held-out problems of the file; see `Task.eval_dataset`.

        Raises:
            InputError: it has fewer.
        """
        if whole("eval prompts", n, 1, argument="") > len(self._test):
            raise InputError(f"eval prompts: got {n}; task {self.name!r} has {len(self._test)} held-out problems")
        return table(self._test[:n])

    def gold(self, row: Row) -> str:
        """The right answer in a box; see `Task.gold`."""
        return f"\\boxed{{{row['answer']}}}" if self.grader == "math" else str(row["answer"])

    def final_answer(self, completion: str) -> str:
        """The answer that counts; see `Task.final_answer`."""
        found = _final(completion)
        return found if self.grader == "exact" else last_number(found) or found

    def score(self, completion: str, row: Row) -> float:
        """1 for a right answer, else 0; see `Task.score`."""
        found = _final(completion)
        if not found or found == row["answer"]:
            return float(bool(found))
        return float(GRADERS[self.grader](found if boxed(completion) is None else f"\\boxed{{{found}}}", row["answer"]))

    def prepare(self, row: Row) -> bool:
        """Import math-verify, outside the seal and the time limit; see `Task.prepare`."""
        return self.grader == "math" and "math_verify" not in sys.modules and bool(import_module("math_verify"))

    def __getstate__(self) -> dict[str, Any]:
        """Without the problems, which graders do not need."""
        return {**super().__getstate__(), "_train": [], "_test": []}


def _final(completion: str) -> str:
    for found in (boxed(completion), tagged(completion)):
        if found is not None:
            return found
    return completion.strip()


def _same_number(found: str, answer: str) -> bool:
    given, right = last_number(found), last_number(answer)
    return given is not None and right is not None and float(given) == float(right)


def _same_mathematics(found: str, answer: str) -> bool:
    """As math-verify sees it; its own time limit is an alarm, and ours is there already."""
    from math_verify import verify

    return bool(verify(_parsed(f"\\boxed{{{answer}}}"), _parsed(found), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "math": _same_mathematics,
    "number": _same_number,
    "exact": lambda found, answer: " ".join(found.split()) == " ".join(answer.split()),
}


def _answer(where: str, value: Any) -> str:
    """The right answer as text: what follows the last ####, and 142.0 as 142."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).rpartition("####")[2].strip() if isinstance(value, (str, int, float)) else ""
    if not text:
        raise InputError(f"{where}: the answer is {value!r}; must be text or a number")
    return text


def _is_file(source: str) -> bool:
    return bool(Path(source).suffix) and Path(source).suffix in READERS or Path(source).exists()


def _file_rows(argument: str, path: Path) -> Iterable[tuple[str, Any]]:
    if path.suffix not in READERS:
        raise InputError(f"task_args.{argument}={str(path)!r}: must end in {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix](path)
    except FileNotFoundError:
        raise InputError(
            f"task_args.{argument}={str(path)!r}: no such file; give one, or a Hub data set's name"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"task_args.{argument}={str(path)!r}: cannot be read, {' '.join(str(error).split())}"
        ) from None


def _json_lines(path: Path) -> Iterable[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number} is no JSON ({error})") from None


def _json(path: Path) -> Iterable[tuple[str, Any]]:
    rows = json.loads(path.read_text("utf-8"))
    if not isinstance(rows, list):
        raise ValueError("must be a list of objects; for one object a line, name the file .jsonl")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _csv(path: Path) -> Iterable[tuple[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from ((f"row {number}", row) for number, row in enumerate(csv.DictReader(file), 1))


def _parquet(path: Path) -> Iterable[tuple[str, Any]]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    return ((f"row {number}", row) for number, row in enumerate(parquet.read_table(path).to_pylist(), 1))


READERS: dict[str, Callable[[Path], Iterable[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub_rows(argument: str, name: str, config: str | None, split: str) -> Iterable[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, config, split=split)
    except Exception as error:  # the network, the Hub and the data set's own form each have their errors
        raise InputError(
            f"task_args.{argument}={name!r}: no such file, and not loaded from the Hub "
            f"({' '.join(str(error).split())[:160]}); give a path that ends in {', '.join(READERS)}, "
            "or a Hub name while online"
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(data, 1))
