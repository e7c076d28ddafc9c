"""Runs as a report shows them: what their folders hold, and what they are called beside each other."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bandpo._input import InputError
from bandpo.clips import get_clip
from bandpo.lab.run import records
from bandpo.lab.run.records import Eval, Facts, Record, Sample, Score, Step

Kind = TypeVar("Kind", bound=Record)


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells.

    Attributes:
        folder: the run's output folder.
        name: a short label, unique among the runs read together.
        facts: what run.json says.
        recipe: the resolved recipe, YAML text.
        steps: one record for each optimiser step, in order.
        evals: the evaluations on the way, in order.
        samples: completions before and after.
        tokens: 1-d arrays old_logps, logps (nats) and advantages of tokens that were trained on; only finite ones.
        missing: one sentence for each file that could not be used.
        arm: which of the arms read together the run belongs to, from 0; runs of one arm share a colour.
    """

    folder: Path
    name: str
    facts: Facts
    recipe: str | None = None
    steps: list[Step] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    tokens: dict[str, np.ndarray] | None = None
    missing: list[str] = field(default_factory=list)
    arm: int = 0

    def evaluations(self) -> list[tuple[int, Score]]:
        """Return every evaluation with its step, in order, those of before and after the run included."""
        points: dict[int, Score] = {record.step: record for record in self.evals}
        if self.facts.before:
            points[0] = self.facts.before
        if self.facts.after and self.steps:
            points[self.steps[-1].step] = self.facts.after
        return sorted(points.items())


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, in their order, and give each a name of its own; the first is what a report is about."""
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
    for extra in (_seed, lambda r: r.folder.name, lambda r: str(r.folder)):
        count = Counter(run.name for run in runs)
        runs = [replace(r, name=f"{r.name}, {extra(r)}") if count[r.name] > 1 else r for r in runs]
    return runs


def by_arm(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each arm together, arms and runs in their order."""
    arms: dict[int, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return list(arms.values())


def read_run(folder: Path) -> Run:
    """Read a run from its output folder; what could not be read is in ``missing``."""
    if not any(os.path.isfile(folder / name) for name in ("run.json", "metrics.jsonl")):  # of any name, however long
        there = "holds no run (neither run.json nor metrics.jsonl)"
        what = there if os.path.isdir(folder) else "there is no such folder"
        raise InputError(f"{str(folder)[:200]}: {what}; give the --out folder of `bandpo train`")
    missing: list[str] = []
    facts = records.read_facts(folder / "run.json", missing) or Facts()
    lines = records.read_records(folder / "metrics.jsonl", missing)
    tokens: dict[str, np.ndarray] = {}
    if facts.engine == "verl" and not (folder / "tokens.npz").exists():
        missing.append("The tokens at the clip's region: verl keeps none.")
    else:
        tokens = records.read_tokens(folder / "tokens.npz", missing)
    return Run(
        folder=folder,
        name=clip_label(facts),
        facts=facts,
        recipe=records.read_text(folder / "recipe.yaml", missing),
        steps=_in_order(lines, Step),
        evals=_in_order(lines, Eval),
        samples=records.read_samples(folder / "samples.json", missing),
        tokens=_finite(tokens) if tokens else None,
        missing=missing,
    )


def clip_label(facts: Facts) -> str:
    """Return a short name for a run's clip, such as ``"band kl 0.05, cap 10"`` or ``"no clip"``."""
    if facts.clip is None:
        return "unknown clip"
    if facts.clip == "none":
        return "no clip"
    settings = dict(facts.clip_args)
    try:
        clip: Any = get_clip(facts.clip, **settings)
        settings = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)} | settings
    except Exception:  # a clip of another version, or of a file that is gone: what the run wrote down has to do
        settings = dict(facts.clip_args)
    words = [facts.clip, *(f"{settings.pop(k)}" for k in ("divergence", "delta") if k in settings)]
    if "eps_low" in settings and "eps_high" in settings:
        words.append(f"{settings.pop('eps_low')} / {settings.pop('eps_high')}")
    rest = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items() if v is not None]
    return ", ".join([" ".join(words), *(word for word in rest if not word.startswith("name "))])


def with_arms(folder: Path) -> list[Path]:
    """Return a run's folder and those of the arms that ``--compare`` put below it."""
    arms = folder.glob("arms/*/run.json") if os.path.isdir(folder / "arms") else ()
    return [folder, *sorted(path.parent for path in arms)]


def _in_order(lines: Sequence[Record], kind: type[Kind]) -> list[Kind]:
    """Return one kind of record by step; where a resumed run repeats a step, the later record counts."""
    kept = {record.step: record for record in lines if isinstance(record, kind)}
    return [kept[step] for step in sorted(kept)]


def _finite(tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name: tokens[name] for name in ("old_logps", "logps", "advantages")}
    finite = np.logical_and.reduce([np.isfinite(array) for array in arrays.values()])
    return {name: array[finite] for name, array in arrays.items()}


def _seed(run: Run) -> str:
    return "seed ?" if run.facts.seed is None else f"seed {run.facts.seed}"
