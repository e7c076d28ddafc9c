"""What a study keeps of its runs: curves and evaluations, small enough for a repository; the report needs no more."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from bandpo._input import InputError
from bandpo.lab.run import records as run_records
from bandpo.lab.run.records import Eval, Step, write_whole
from bandpo.loss.stats import BUCKETS

FILE = "records.json.gz"
MOST_BYTES = 256_000_000
CURVES = {
    "reward": "reward", "entropy": "entropy", "clipped": "clipped", "gradient_kept": "clip/gradient_kept",
    "kl": "clip/kl_mean",
}  # fmt: skip
SCORES = ("accuracy", "low", "high", "entropy", "n", "pass_at_k", "length", "failed")
_Numbers = Annotated[list[float | None], BeforeValidator(list)]


class RunRecord(BaseModel):
    """A run, as far as the study keeps it.

    Args:
        arm: its arm.
        setting: its setting.
        seed: its seed.
        status: "done"; "stopped" where a NaN or an infinity ended it, which is a finding; "failed" by anything else.
        error: why it ended, where it is not done.
        fingerprint: what tells it from a run of the same name with another recipe.
        seconds: of training.
        curves: by rollout: reward, entropy, clipped, gradient_kept, kl.
        evals: held-out evaluations, by optimiser step; step 0 is before training.
        buckets: gradient kept by old probability, mean over updates, where it was recorded.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    arm: str
    setting: str
    seed: int
    status: Literal["done", "stopped", "failed"]
    error: str | None = None
    fingerprint: str = ""
    seconds: float = 0.0
    curves: dict[str, _Numbers] = {}
    evals: list[dict[str, float | int | None]] = []
    buckets: dict[str, float] = {}

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is in the study."""
        return self.arm, self.setting, self.seed


class Amendment(BaseModel):
    """A later form of the study's file.

    Args:
        text: the file.
        after: how many runs had ended by then.
    """

    text: str
    after: int


class Records(BaseModel):
    """What a study keeps.

    Args:
        name: the file's name.
        text: the study's file as it stood before the first run.
        amendments: its later forms.
        words: keys of the command line that won over the study's.
        origin: versions, commit and machine.
        recipes: the recipe of every arm in every setting, seed and model left out.
        runs: the runs that have ended.
    """

    model_config = ConfigDict(extra="ignore")
    version: Literal[1] = 1
    name: str
    text: str
    amendments: list[Amendment] = []
    words: list[str] = []
    origin: dict[str, Any] = {}
    recipes: dict[str, dict[str, Any]] = {}
    runs: list[RunRecord] = []

    @property
    def newest(self) -> str:
        """The study's file in its last form."""
        return self.amendments[-1].text if self.amendments else self.text

    def put(self, run: RunRecord) -> None:
        """Take a run, instead of one of the same arm, setting and seed."""
        self.runs = [x for x in self.runs if x.key != run.key] + [run]

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all; equal records give equal bytes."""
        text = json.dumps(self.model_dump(exclude_defaults=True) | {"version": 1}, separators=(",", ":"))
        write_whole(folder / FILE, gzip.compress(text.encode("utf-8", "backslashreplace"), mtime=0))


def read(folder: Path) -> Records | None:
    """Read the records of a study.

    Args:
        folder: the study's folder, or the file.

    Returns:
        The records; None where there are none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / FILE if folder.is_dir() else folder
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        return Records.model_validate_json(data)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as records of a study ({why}); move it away to make them anew"
        ) from None


def from_folder(folder: Path, arm: str, setting: str, seed: int, fingerprint: str) -> RunRecord:
    """Read the record of a run that has ended.

    Args:
        folder: the run's folder.
        arm: its arm.
        setting: its setting.
        seed: its seed.
        fingerprint: its fingerprint.

    Returns:
        The record.
    """
    facts = run_records.read_facts(folder / "run.json", []) or run_records.Facts()
    lines = run_records.read_records(folder / "metrics.jsonl", [])
    steps = [x for x in lines if isinstance(x, Step)]
    evals = [{"step": x.step, **_score(x)} for x in lines if isinstance(x, Eval)]
    last = max((x.step for x in steps), default=0)
    if facts.before:
        evals.insert(0, {"step": 0, **_score(facts.before)})
    if facts.after:
        evals = [e for e in evals if e["step"] != last] + [{"step": last, **_score(facts.after)}]
    curves = {name: _curve(steps, key) for name, key in CURVES.items()}
    status: Literal["done", "failed"] = "done" if facts.status == "done" else "failed"
    return RunRecord(
        arm=arm, setting=setting, seed=seed, status=status, error=facts.error, fingerprint=fingerprint,
        seconds=short(max((x.seconds for x in steps), default=0.0)) or 0.0, evals=evals, buckets=_buckets(steps),
        curves={name: curve for name, curve in curves.items() if any(x is not None for x in curve)},
    )  # fmt: skip


def short(value: float | None) -> float | None:
    """A number with six digits, which is more than it means; None where it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _score(score: Any) -> dict[str, float | int | None]:
    found = {name: getattr(score, name, None) for name in SCORES}
    return {
        name: value if isinstance(value, int) else short(value) for name, value in found.items() if value is not None
    }


def _curve(steps: Sequence[Step], key: str) -> list[float | None]:
    """The mean over each rollout's updates."""
    found: dict[int, list[float]] = {}
    for step in steps:
        found.setdefault(step.rollout, []).append(step.number(key))
    return [short(_mean(values)) for _, values in sorted(found.items())]


def _buckets(steps: Sequence[Step]) -> dict[str, float]:
    means: Mapping[str, float] = {b: _mean([s.number(f"clip/gradient_kept/{b}") for s in steps]) for b in BUCKETS}
    return {name: value for name, mean in means.items() if (value := short(mean)) is not None}


def _mean(values: Sequence[float]) -> float:
    there = [x for x in values if math.isfinite(x)]
    return sum(there) / len(there) if there else math.nan
