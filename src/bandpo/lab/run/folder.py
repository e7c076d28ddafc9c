"""A run's folder: what lies where, who owns it, and how it is taken back to a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bandpo._input import InputError
from bandpo.lab.reading import read_yaml
from bandpo.lab.run import records
from bandpo.lab.run.checkpoints import SEAL
from bandpo.lab.run.records import Eval, Facts, Record, Sample, Step, put_aside, write_whole

try:
    import fcntl
except ImportError:  # Windows has no such locks: there a person has to see to it
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """The layout of a run's output folder.

    Args:
        path: the folder; it need not exist yet.

    Attributes:
        checkpoints: the engine's checkpoints.
        model: the trained model and its tokenizer; there only once it is complete.
        arms: the runs that are compared with this one, a folder each.
        warmup: the warm-up checkpoint, where the run makes its own.
        report: the page.
        said: what was wrong with files that were read, one line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.model = path / "checkpoints", path / "model"
        self.arms, self.warmup, self.report = path / "arms", path / "warmup", path / "report.html"
        self.said: list[str] = []
        self.lock: int | None = None
        self._recipe, self._facts = path / "recipe.yaml", path / "run.json"
        self._metrics, self._tokens, self._samples = path / "metrics.jsonl", path / "tokens.npz", path / "samples.json"
        self._known: Facts | None = None

    # ------------------------------------------------------------ whose it is

    def has_run(self) -> bool:
        """Whether a run of ours has been started here."""
        return self._facts.exists() or self._recipe.exists() or any(self.checkpoints.glob(f"*/{SEAL}"))

    def occupied(self) -> bool:
        """Whether anything is here that a run would write over."""
        return self.has_run() or self._metrics.exists() or self.model.exists() or any(self.checkpoints.glob("*"))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Own the folder for the block, made where it is not there; where nothing is written, nothing is left."""
        made, lock = [], self.path / ".lock"
        try:
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            _remove(made)
            why = getattr(error, "strerror", None) or error
            shown = str(self.path)[:200]
            raise InputError(f"out={shown}: cannot be written ({why}); name another folder with --out") from None
        owned = False
        try:
            self._own(self.lock, lock)
            owned = True
            yield
        finally:
            if owned and not self.has_run():  # else the lock is another's
                lock.unlink(missing_ok=True)
                _remove(made)
            os.close(self.lock)
            self.lock = None

    def _own(self, descriptor: int, lock: Path) -> None:
        """Take the lock that the system gives back when its owner is dead, and say in it who owns it."""
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            raise InputError(
                f"out={self.path}: {who} is training into it; wait for it, stop it, or name another folder with --out"
            ) from None
        except OSError as error:
            self.said.append(f"the disk of {self.path} has no locks ({error.strerror}): keep other processes away")
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise InputError(f"out={self.path}: another process has just left it; try again")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    # ------------------------------------------------------------ run.json, recipe.yaml

    @property
    def facts(self) -> Facts:
        """What run.json says; empty where there is none or it cannot be read."""
        if self._known is None:
            said: list[str] = []
            self._known = records.read_facts(self._facts, said) or Facts()
            self.said += said if self._facts.exists() else []
        return self._known

    def update(self, **fields: Any) -> None:
        """Set fields of run.json."""
        self._known = self.facts.model_copy(update=fields)
        write_whole(self._facts, self._known.model_dump_json(indent=2, exclude_unset=True) + "\n")

    def stored_recipe(self) -> dict[str, Any] | None:
        """The keys of the recipe that the run was started with; None where they cannot be read."""
        said: list[str] = []
        text = records.read_text(self._recipe, said)
        self.said += said if self._recipe.exists() else []
        try:
            keys = read_yaml(text, "recipe.yaml") if text is not None else None
        except InputError as error:
            self.said.append(f"{error}.")
            return None
        return keys if isinstance(keys, dict) else None

    def create(self, text: str, /, **fields: Any) -> None:
        """Make the folder, with the recipe's text and run.json; what stands in the way of its parts is moved aside."""
        self.path.mkdir(parents=True, exist_ok=True)
        for place in (self.checkpoints, self.arms, self.warmup, self.path / "model.partial"):
            if os.path.lexists(place) and not place.is_dir():
                put_aside(place)
        if self.report.is_dir():
            put_aside(self.report)
        if self._facts.exists() and records.read_facts(self._facts, []) is None:
            put_aside(self._facts)
        write_whole(self._recipe, text)
        self.update(**fields)

    # ------------------------------------------------------------ metrics.jsonl, samples.json, tokens.npz

    def records(self) -> list[Step | Eval]:
        """The records of metrics.jsonl, in their order."""
        return records.read_records(self._metrics, [])

    def add(self, record: Record) -> None:
        """Add a record to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(records.as_lines([record]))

    def samples(self) -> list[Sample]:
        """What samples.json holds; empty where it cannot be read."""
        return records.read_samples(self._samples, [])

    def write_samples(self, samples: list[Sample]) -> None:
        """Write samples.json."""
        write_whole(self._samples, json.dumps([sample.model_dump(exclude_none=True) for sample in samples], indent=1))

    def tokens(self) -> dict[str, np.ndarray]:
        """The arrays of tokens.npz; empty where it cannot be read."""
        found = records.read_tokens(self._tokens, [])
        return found if "step" in found else {}

    def write_tokens(self, tokens: dict[str, np.ndarray]) -> None:
        """Write tokens.npz."""
        buffer = BytesIO()
        np.savez_compressed(buffer, **tokens)  # type: ignore[arg-type]
        write_whole(self._tokens, buffer.getvalue())

    def rewind(self, step: int, say: Callable[[str], None]) -> None:
        """Forget everything after a step, as the run will make it again; a file with faults is kept aside."""
        for path, read in ((self._metrics, records.read_records), (self._tokens, records.read_tokens)):
            said: list[str] = []
            found: Any = read(path, said)
            if not os.path.lexists(path):
                continue
            if said:
                say(f"{' '.join(said[:3])} It is now {put_aside(path).name}.")
            if path == self._metrics:
                write_whole(path, records.as_lines(record for record in found if record.step <= step))
            elif "step" in found:
                self.write_tokens({name: values[found["step"] <= step] for name, values in found.items()})
        for folder in self.checkpoints.glob("checkpoint-*"):
            number = folder.name.removeprefix("checkpoint-")
            if number.isdecimal() and int(number) > step and folder.is_dir():
                shutil.rmtree(folder)


def check_space(path: Path, need: int) -> None:
    """Check that the disk of a run's folder has room for the bytes that the finished run will take."""
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    free = shutil.disk_usage(next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())).free
    if free < need - there:
        raise InputError(
            f"out={path}: the run needs {(need - there) / 1e6:,.0f} MB of disk and {free / 1e6:,.0f} MB are free; make "
            "room, name another folder with --out, or keep fewer checkpoints with --save_total_limit 2"
        )


def _remove(folders: list[Path]) -> None:
    """Remove folders, the innermost first, that are there and empty."""
    for folder in folders:
        with suppress(OSError, ValueError):
            folder.rmdir()
