"""A run's folder: what lies where, written so that a kill at any moment leaves something to go on from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bandpo._input import InputError
from bandpo.doctor import installed_version

PACKAGES = ("bandpo", "torch", "trl", "transformers", "accelerate", "datasets", "peft", "verl", "ray")


class RunFolder:
    """The layout of a run's output folder.

    Args:
        path: the folder; it need not exist yet.

    Attributes:
        checkpoints: TRL's checkpoints, `checkpoint-N`.
        model: the trained model and its tokenizer; there only once it is complete.
        arms: the runs that are compared with this one, a folder each.
        warmup: the warm-up checkpoint, where the run makes its own.
        samples: completions before and after, JSON.
        report: the page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.arms = path / "arms"
        self.warmup = path / "warmup"
        self.samples = path / "samples.json"
        self.report = path / "report.html"
        self._recipe = path / "recipe.yaml"
        self._info = path / "run.json"
        self._metrics = path / "metrics.jsonl"
        self._tokens = path / "tokens.npz"

    def holds_run(self) -> bool:
        """Whether a run has been started here."""
        files = (self._info, self._recipe, self._metrics, self.model)
        return any(path.exists() for path in files) or any(self.checkpoints.glob("checkpoint-*"))

    def info(self) -> dict[str, Any]:
        """The fields of run.json; none when there is no such file."""
        return json.loads(self._info.read_text()) if self._info.exists() else {}

    def update(self, **fields: Any) -> None:
        """Set fields of run.json."""
        write_whole(self._info, json.dumps({**self.info(), **fields}, indent=2) + "\n")

    def stored_recipe(self) -> dict[str, Any]:
        """The keys of the recipe this folder's run was started with; none when there is no such file."""
        return yaml.safe_load(self._recipe.read_text()) if self._recipe.exists() else {}

    def check_same(self, values: dict[str, Any]) -> None:
        """Check that the run in this folder, if there is one, was started with these very keys.

        Args:
            values: the keys of the recipe to go on with.

        Raises:
            InputError: a key differs; names it.
        """
        stored = self.stored_recipe()
        for key in {**stored, **values} if stored else ():
            before, now = stored.get(key), values.get(key)
            if before != now:
                raise InputError(
                    f"--resume: {key}={now!r}, but the run in {self.path} was started with {key}={before!r}; set it "
                    "back, or start another run with --out"
                )

    def create(self, text: str, /, **fields: Any) -> None:
        """Make the folder, with the recipe's text and run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self._recipe, text)
        self.update(**fields)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line that a kill cut short is left out."""
        if not self._metrics.exists():
            return []
        records = []
        for line in self._metrics.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def write_tokens(self, tokens: dict[str, np.ndarray]) -> None:
        """Write tokens.npz."""
        partial = self._tokens.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **tokens)  # type: ignore[arg-type]
        partial.replace(self._tokens)

    def tokens(self) -> dict[str, np.ndarray]:
        """The arrays of tokens.npz; none when there is no such file."""
        if not self._tokens.exists():
            return {}
        with np.load(self._tokens) as arrays:
            return dict(arrays)

    def last_checkpoint(self, before: int | None = None) -> tuple[Path | None, int]:
        """The newest complete checkpoint and its step, (None, 0) when there is none.

        Args:
            before: only checkpoints of an earlier step than this one; None for all.
        """
        found: list[tuple[int, Path]] = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:  # the trainer writes this file last
                step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
            except (OSError, json.JSONDecodeError):
                continue
            if before is None or step < before:
                found.append((step, folder))
        if not found:
            return None, 0
        step, folder = max(found)
        return folder, step

    def rewind(self, step: int) -> None:
        """Forget everything after a step: later checkpoints, records and tokens, as the run will make them again."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            number = folder.name.removeprefix("checkpoint-")
            if number.isdigit() and int(number) > step:
                shutil.rmtree(folder)
        if self._metrics.exists():
            kept = [record for record in self.metrics() if record["step"] <= step]
            write_whole(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))
        tokens = self.tokens()
        if tokens:
            kept_tokens = tokens["step"] <= step
            self.write_tokens({name: values[kept_tokens] for name, values in tokens.items()})


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, sees either the old text or the new.

    Args:
        path: the file.
        text: what it shall hold.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def check_folder(path: Path, *, resume: bool) -> None:
    """Check that a run can be written to a folder, without making it.

    Args:
        path: the run's folder.
        resume: whether a run may be there already.

    Raises:
        InputError: another run is there, or nothing can be written there.
    """
    folder = RunFolder(path)
    if folder.holds_run() and not (resume and folder.info()):
        raise InputError(
            f"out={path}: holds a run already; continue it with --resume, or name another folder with --out"
        )
    parent = _existing(path)
    try:
        if not parent.is_dir():
            raise NotADirectoryError(20, "not a folder")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"out={path}: cannot be written ({parent}: {error.strerror or error}); name another folder with --out"
        ) from error


def check_space(path: Path, need: int) -> None:
    """Check that the disk has room for a run.

    Args:
        path: the run's folder.
        need: bytes that the finished run will take.

    Raises:
        InputError: there is less room.
    """
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    free = shutil.disk_usage(_existing(path)).free
    if free < need - there:
        raise InputError(
            f"out={path}: the run needs {(need - there) / 1e6:,.0f} MB of disk and {free / 1e6:,.0f} MB are free; make "
            "room, name another folder with --out, or keep fewer checkpoints with --save_total_limit 2"
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    packages = {name: found for name in PACKAGES if (found := installed_version(name))}
    return {"python": platform.python_version(), **packages}


def commit() -> str | None:
    """The commit of bandpo's own checkout, "-dirty" when it has changes; None when installed from a package."""
    here = Path(__file__).parent
    try:
        for command in (
            ["ls-files", "--error-unmatch", "__init__.py"],
            ["describe", "--always", "--dirty", "--abbrev=40"],
        ):
            done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True)
            if done.returncode:
                return None
    except OSError:
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What the run runs on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
