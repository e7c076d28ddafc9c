"""What a run leaves, typed, and the one reader of it: a torn tail is no fault, anything else wrong is said."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bandpo._input import InputError

MOST_BYTES = 256_000_000  # of a file that is read whole; a run of months leaves less
TOKENS = {"old_logps": np.float32, "logps": np.float32, "advantages": np.float32, "step": np.int32}
Kind = TypeVar("Kind", bound=BaseModel)


class Record(BaseModel):
    """A line of metrics.jsonl; what an engine logs beyond the fields is kept under its own name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    step: int = Field(ge=0)

    def number(self, name: str) -> float:
        """Return a number of the record; NaN where it is missing or no number."""
        value = getattr(self, name) if name in type(self).model_fields else (self.model_extra or {}).get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return the record as it stands in the file."""
        return self.model_dump(exclude_none=True)


class Step(Record):
    """What an optimiser step logged; with verl, a rollout's last.

    Attributes:
        step: optimiser steps made.
        rollout: rollouts begun.
        seconds: of training, over all parts of the run.
        reward: mean training reward.
        entropy: of the next token, nats.
        clipped: share of tokens that the clip left without a gradient.
        loss: the loss.
        grad_norm: norm of the gradient.
        learning_rate: the learning rate.
    """

    event: Literal["step"] = "step"
    rollout: int = 0
    seconds: float = 0.0
    reward: float | None = None
    entropy: float | None = None
    clipped: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None


class Score(BaseModel):
    """A held-out evaluation.

    Attributes:
        accuracy: share of right completions.
        low: lower end of its 95 % interval.
        high: upper end.
        entropy: of the next token, nats; None with verl.
        n: completions.
        pass_at_k: share of the prompts with at least one fully right completion.
        length: mean number of tokens.
        failed: completions that could not be graded.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    accuracy: float
    low: float
    high: float
    entropy: float | None = None
    n: int
    pass_at_k: float | None = None
    length: float | None = None
    failed: int | None = None


class Eval(Score, Record):
    """An evaluation in the middle of a run."""

    event: Literal["eval"] = "eval"


class Sample(BaseModel):
    """A held-out problem, and what was written before and after."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    prompt: Any
    answer: Any = ""
    before: str | None = None
    correct_before: bool | None = None
    after: str | None = None
    correct_after: bool | None = None


class Facts(BaseModel):
    """What run.json says.

    Attributes:
        command: the command to repeat the run.
        recipe: the recipe's name.
        overrides: the command line's keys.
        engine: what trained, "trl" or "verl".
        workers: processes that trained.
        compare: whether the run has arms that it is compared with.
        warmup: whether the run made its own warm-up checkpoint.
        status: "running", "done", "interrupted" or "failed".
        error: why it ended, where it did not end well.
        before: the evaluation before training.
        after: the evaluation after training.
        trained: size and checksum of each file of the trained model, once that is complete.
        seconds: of training.
    """

    model_config = ConfigDict(extra="ignore")
    command: str | None = None
    recipe: str | None = None
    overrides: list[str] = []
    engine: str | None = None
    workers: int | None = None
    compare: bool = False
    warmup: bool = False
    task: str | None = None
    model: str | None = None
    clip: str | None = None
    clip_args: dict[str, Any] = {}
    seed: int | None = None
    commit: str | None = None
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    status: str | None = None
    error: str | None = None
    before: Score | None = None
    after: Score | None = None
    trained: dict[str, tuple[int, int]] | None = None
    seconds: float | None = None


# ---------------------------------------------------------------- reading: what is wrong is said, and never fatal


def read_facts(path: Path, said: list[str]) -> Facts | None:
    """Read run.json; a field of another type is left out and said, None where nothing can be read."""
    found = _part(path, lambda file: json.loads(file.read_text("utf-8")), said)
    if found is not None and not isinstance(found, dict):
        said.append(f"{path.name} cannot be read (it is no JSON object).")
        return None
    while found is not None:
        try:
            return Facts.model_validate(found)
        except ValidationError as error:
            for wrong in {str(e["loc"][0]) for e in error.errors()}:
                said.append(f"{path.name} has a {wrong} of another kind ({str(found.pop(wrong))[:200]}).")
    return None


def read_records(path: Path, said: list[str]) -> list[Step | Eval]:
    """Read metrics.jsonl; a last line that a kill cut short is dropped, other bad lines are left out and said."""
    records: list[Step | Eval] = []
    bad: list[str] = []
    lines = (_part(path, Path.read_bytes, said) or b"").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line.decode("utf-8")) if line.strip() else None
            if found is not None:
                records.append((Eval if found.get("event") == "eval" else Step).model_validate(found))
        except (ValueError, AttributeError, RecursionError) as error:  # a ValidationError is a ValueError
            torn = number == len(lines) and line.startswith(b'{"') and line.isascii() and not line.endswith(b"}")
            bad += [] if torn else [f"line {number}: {_why(error)}"]
    if bad:
        said.append(f"{path.name} has {len(bad)} lines that are no records ({bad[0]}).")
    return records


def read_samples(path: Path, said: list[str]) -> list[Sample]:
    """Read samples.json; empty where it cannot be read."""

    def parse(file: Path) -> list[Sample]:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, list):
            raise ValueError("not a JSON list")
        return [Sample.model_validate(item) for item in found]

    return _part(path, parse, said) or []


def read_tokens(path: Path, said: list[str]) -> dict[str, np.ndarray]:
    """Read tokens.npz: old_logps, logps, advantages and step of as many tokens; empty where it cannot be read."""

    def parse(file: Path) -> dict[str, np.ndarray]:
        with zipfile.ZipFile(file) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes")
        with np.load(file, allow_pickle=False) as arrays:
            names = [name for name in TOKENS if name in arrays or name != "step"]
            found = {name: np.asarray(arrays[name], TOKENS[name]).ravel() for name in names}
        if len({len(array) for array in found.values()}) != 1:
            raise ValueError("arrays of different lengths")
        return found

    return _part(path, parse, said) or {}


def read_text(path: Path, said: list[str]) -> str | None:
    """Read a text file; None where it cannot be read."""
    return _part(path, lambda file: file.read_text("utf-8"), said)


def _part(path: Path, parse: Callable[[Path], Any], said: list[str]) -> Any:
    """Read one file, or say why not; a link may lead anywhere, so it is not followed."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError("it is no file of this folder")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        return parse(path)
    except FileNotFoundError:
        said.append(f"{path.name} is not there.")
    except (OSError, EOFError, ValueError, KeyError, RecursionError, MemoryError, zipfile.BadZipFile) as error:
        said.append(f"{path.name} cannot be read ({_why(error)}).")
    return None


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------- writing


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader, or a kill, or a full disk, leaves either the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    for place in (partial, path):
        if place.is_dir() and not place.is_symlink():
            put_aside(place)
    partial.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace"))
    os.replace(partial, path)


def as_lines(records: Iterable[Record]) -> str:
    """Records as lines of metrics.jsonl."""
    return "".join(json.dumps(record.as_dict()) + "\n" for record in records)


def put_aside(path: Path) -> Path:
    """Rename what cannot be used, so that nothing is lost and nothing stands in the way; returns its new name."""
    place, number = path.with_name(f"set-aside-{path.name}"), 1
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"set-aside-{number}-{path.name}")
    try:
        path.rename(place)
    except OSError as error:
        raise InputError(f"{path}: cannot be used and cannot be moved aside ({error.strerror}); move it") from None
    return place
