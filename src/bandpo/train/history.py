"""Read what a run left in its folder; a file that is missing or broken is noted, never fatal."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bandpo._input import InputError
from bandpo.clips import get_clip

TOKEN_ARRAYS = ("old_logps", "logps", "advantages")


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells.

    Attributes:
        folder: the run's output folder.
        name: a short label, unique among the runs read together.
        info: the fields of run.json.
        recipe: the resolved recipe, YAML text.
        steps: the "step" records of metrics.jsonl, one for each optimiser step, in order.
        evals: the "eval" records, in order.
        samples: completions before and after.
        tokens: 1-d arrays old_logps, logps (nats) and advantages of tokens that were trained on; only finite ones.
        missing: one sentence for each file that could not be used.
        arm: which of the arms read together the run belongs to, from 0; runs of one arm share a colour.
    """

    folder: Path
    name: str
    info: dict[str, Any]
    recipe: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, np.ndarray] | None = None
    missing: list[str] = field(default_factory=list)
    arm: int = 0

    @property
    def before(self) -> dict[str, Any]:
        """The evaluation before training; empty when there is none."""
        return found if isinstance(found := self.info.get("before"), dict) else {}

    @property
    def after(self) -> dict[str, Any]:
        """The evaluation after training; empty when there is none."""
        return found if isinstance(found := self.info.get("after"), dict) else {}

    def evaluations(self) -> list[dict[str, Any]]:
        """Return every evaluation in order of its step, those of before and after the run included."""
        points = {record["step"]: record for record in self.evals}
        if self.before:
            points[0] = {"step": 0, **self.before}
        if self.after and self.steps:
            last = self.steps[-1]["step"]
            points[last] = {"step": last, **self.after}
        return [points[step] for step in sorted(points)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs and give each a name of its own.

    Args:
        folders: output folders of ``bandpo train``; the first one is the run a report is about.

    Returns:
        The runs, in the same order.

    Raises:
        InputError: no folder was given, one is given twice, or one holds no run.
    """
    if not folders:
        raise InputError("folders=[]: a report needs at least one run; give the --out folder of `bandpo train`")
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise InputError(f"{folder}: given twice; give each run once")
        seen.add(folder.resolve())
    runs = [read_run(folder) for folder in folders]
    arms = list(dict.fromkeys(run.name for run in runs))
    # Runs of one clip only are told apart by colour; with several clips, colour tells the clips apart.
    runs = [replace(r, arm=i if len(arms) == 1 else arms.index(r.name)) for i, r in enumerate(runs)]
    for extra in (lambda r: f"seed {r.info.get('seed', '?')}", lambda r: r.folder.name, lambda r: str(r.folder)):
        count = Counter(run.name for run in runs)
        runs = [replace(r, name=f"{r.name}, {extra(r)}") if count[r.name] > 1 else r for r in runs]
    return runs


def by_arm(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each arm together, arms and runs in their order."""
    arms: dict[int, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return list(arms.values())


def number(record: dict[str, Any], key: str) -> float:
    """Return a number of a record; NaN where it is missing or no number."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def read_run(folder: Path) -> Run:
    """Read one run.

    Args:
        folder: an output folder of ``bandpo train``.

    Returns:
        The run; what could not be read is in ``missing``.

    Raises:
        InputError: the folder is not there or holds neither run.json nor metrics.jsonl.
    """
    if not (folder / "run.json").is_file() and not (folder / "metrics.jsonl").is_file():
        what = "holds no run (neither run.json nor metrics.jsonl)" if folder.is_dir() else "there is no such folder"
        raise InputError(f"{folder}: {what}; give the --out folder of `bandpo train`")
    missing: list[str] = []
    info = _part(folder / "run.json", _json_dict, missing) or {}
    records = _part(folder / "metrics.jsonl", _lines, missing) or []
    tokens = None
    if (folder / "tokens.npz").exists() or "engine" not in info:
        tokens = _part(folder / "tokens.npz", _tokens, missing)
    else:
        missing.append(f"The tokens at the clip's region: {info['engine']} keeps none.")
    return Run(
        folder=folder,
        name=clip_label(info),
        info=info,
        recipe=_part(folder / "recipe.yaml", lambda path: path.read_text(encoding="utf-8"), missing),
        steps=_in_order(records, "step"),
        evals=_in_order(records, "eval"),
        samples=_part(folder / "samples.json", _json_list, missing) or [],
        tokens=tokens,
        missing=missing,
    )


def clip_label(info: dict[str, Any]) -> str:
    """Return a short name for the clip of a run.json, such as ``"band kl 0.05, cap 10"`` or ``"no clip"``."""
    name, given = info.get("clip"), info.get("clip_args")
    if name is None:
        return "unknown clip"
    if name == "none":
        return "no clip"
    settings = dict(given) if isinstance(given, dict) else {}
    try:
        clip: Any = get_clip(name, **settings)
        settings = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)} | settings
    except (InputError, TypeError):
        pass  # a clip of another version: what the run itself wrote down has to do
    words = [str(name), *(f"{settings.pop(k)}" for k in ("divergence", "delta") if k in settings)]
    if "eps_low" in settings and "eps_high" in settings:
        words.append(f"{settings.pop('eps_low')} / {settings.pop('eps_high')}")
    rest = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items() if v is not None]
    return ", ".join([" ".join(words), *(word for word in rest if not word.startswith("name "))])


def with_arms(folder: Path) -> list[Path]:
    """Return a run's folder and those of the arms that ``--compare`` put below it."""
    return [folder, *sorted(path.parent for path in folder.glob("arms/*/run.json"))]


def _part(path: Path, read: Callable[[Path], Any], missing: list[str]) -> Any:
    """Read one file, or note in `missing` why not."""
    try:
        return read(path)
    except FileNotFoundError:
        missing.append(f"{path.name} is not there.")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        missing.append(f"{path.name} cannot be read ({error}).")
    return None


def _json_dict(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _json_list(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError("not a JSON list of objects")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line that a killed run left half-written is dropped."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"line {number} is not JSON") from None
        if isinstance(record, dict):
            records.append(record)
    return records


def _in_order(records: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """Return one kind of record by step; where a resumed run repeats a step, the later record counts."""
    kept = {r["step"]: r for r in records if r.get("event") == event and isinstance(r.get("step"), int)}
    return [kept[step] for step in sorted(kept)]


def _tokens(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        arrays = {name: np.asarray(archive[name], dtype=np.float32).ravel() for name in TOKEN_ARRAYS}
    if len({len(array) for array in arrays.values()}) != 1:
        raise ValueError("arrays of different lengths")
    finite = np.logical_and.reduce([np.isfinite(array) for array in arrays.values()])
    return {name: array[finite] for name, array in arrays.items()}
