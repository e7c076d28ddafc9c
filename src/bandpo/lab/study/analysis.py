"""What the seeds say: every figure of a study's report, from its records alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bandpo.lab import stats
from bandpo.lab.study.file import Contrast, Study, parse
from bandpo.lab.study.outcomes import OUTCOMES
from bandpo.lab.study.records import Records, RunRecord

CURVES = ("reward", "entropy", "clipped", "gradient_kept", "kl")
EVALS = ("accuracy", "pass_at_k", "entropy")
POINTS = 41  # of a performance profile

Values = Mapping[int, float]
"""An outcome by seed, where it is finite."""


def analyse(found: Records) -> dict[str, Any]:
    """Return every figure of a study.

    Args:
        found: its records.

    Returns:
        Plain data: name, the study's texts, settings with arms, differences, contrasts and curves; None for what does
        not exist, such as the interval of one seed.

    Raises:
        InputError: the study's text in the records cannot be read.
    """
    study = parse(found.newest, found.name)
    settings = {name: _setting(found, study, name) for name in study.settings}
    contrasts = [
        _contrast(found, study, setting, one) for setting in study.settings for one in study.contrasts_of(setting)
    ]
    _adjust(contrasts)
    return {
        "name": found.name,
        "texts": {
            key: text for key in ("question", "hypotheses", "analysis", "design") if (text := getattr(study, key))
        },
        "amendments": [x.after for x in found.amendments],
        "words": found.words,
        "level": study.level,
        "outcomes": {name: {"title": OUTCOMES[name].title, "means": OUTCOMES[name].means} for name in study.outcomes},
        "runs": dict(Counter(run.status for run in found.runs)),
        "seconds": sum(run.seconds for run in found.runs),
        "contrasts": contrasts,
        "settings": settings,
        "origin": found.origin,
    }


def values_of(found: Records, study: Study, arm: str, setting: str, outcome: str) -> dict[int, float]:
    """Return an outcome of an arm by seed, where it is finite.

    Args:
        found: the records.
        study: the study.
        arm: the arm.
        setting: the setting.
        outcome: one of `OUTCOMES`.

    Returns:
        The values, by seed.
    """
    of = OUTCOMES[outcome].of
    got = {run.seed: of(run, study.found_above) for run in found.runs if (run.arm, run.setting) == (arm, setting)}
    return {seed: value for seed, value in sorted(got.items()) if math.isfinite(value)}


def _setting(found: Records, study: Study, name: str) -> dict[str, Any]:
    arms, reference = study.arms_of(name), study.reference_of(name)
    values = {o: {arm: values_of(found, study, arm, name, o) for arm in arms} for o in study.outcomes}
    runs = [run for run in found.runs if run.setting == name]
    return {
        "question": str(study.settings[name].get("question", "")),
        "reference": reference,
        "seeds": len(study.seeds_of(name)),
        "arms": {arm: _arm(study, [r for r in runs if r.arm == arm], values, arm) for arm in arms},
        "differences": {o: _differences(study, values[o], reference, o) for o in study.outcomes},
        "profile": _profile(values[study.outcomes[0]], study.level),
        "curves": {curve: _bands(runs, arms, curve, study.level) for curve in CURVES},
        "evals": {score: _eval_bands(runs, arms, score, study.level) for score in EVALS},
        "steps": max((int(e["step"] or 0) for run in runs for e in run.evals), default=0),
    }


def _arm(
    study: Study, runs: Sequence[RunRecord], values: Mapping[str, Mapping[str, Values]], arm: str
) -> dict[str, Any]:
    status = Counter(run.status for run in runs)
    numbers = {}
    for place, outcome in enumerate(study.outcomes):
        x = list(values[outcome][arm].values())
        spread = float(np.std(x, ddof=1)) if len(x) > 1 else None
        numbers[outcome] = {**_interval(outcome, x, study.level), "sd": spread}
        if place == 0:
            numbers[outcome]["iqm"] = stats.stratified_bootstrap(x, level=study.level).to_dict() if x else None
    return {
        "done": status["done"], "stopped": status["stopped"], "failed": status["failed"],
        "errors": sorted({str(run.error) for run in runs if run.error}), "outcomes": numbers,
        "buckets": _bucket_means(runs),
    }  # fmt: skip


def _interval(outcome: str, x: Sequence[float], level: float) -> dict[str, Any]:
    if not x:
        return {"estimate": None, "low": None, "high": None, "n": 0}
    if outcome == "found":
        return stats.wilson(round(sum(x)), len(x), level).to_dict()
    return stats.mean_interval(x, level).to_dict()


def _differences(study: Study, values: Mapping[str, Values], reference: str, outcome: str) -> dict[str, dict[str, Any]]:
    """Each arm less the reference; p values adjusted over the arms."""
    made = {arm: _difference(study, values[arm], values[reference], outcome) for arm in values if arm != reference}
    _adjust([d for d in made.values()])
    return made


def _difference(study: Study, a: Values, b: Values, outcome: str) -> dict[str, Any]:
    both = sorted(a.keys() & b.keys())
    if not both:
        return {"n": 0, "p": None, "mean": None}
    x, y = [a[s] for s in both], [b[s] for s in both]
    made: dict[str, Any] = stats.paired(x, y, level=study.level).to_dict()
    made |= {"seeds": both, "sd": float(np.std(np.subtract(x, y), ddof=1)) if len(both) > 1 else None}
    if OUTCOMES[outcome].better and outcome == study.outcomes[0]:
        made["improvement"] = stats.probability_of_improvement(x, y, level=study.level, resamples=1000).to_dict()
    if outcome in study.margin:
        made["equivalence"] = stats.tost(x, y, study.margin[outcome], level=study.level).to_dict()
    return made


def _contrast(found: Records, study: Study, setting: str, one: Contrast) -> dict[str, Any]:
    outcome = one.outcome or study.outcomes[0]
    a, b = (values_of(found, study, arm, setting, outcome) for arm in (one.arm, one.against))
    told = {"arm": one.arm, "against": one.against, "setting": setting, "outcome": outcome}
    return told | _difference(study, a, b, outcome)


def _adjust(differences: Sequence[dict[str, Any]]) -> None:
    """Add `holm`, the p value adjusted over all of these that have one."""
    tested = [d for d in differences if d["p"] is not None]
    for d, p in zip(tested, stats.holm([d["p"] for d in tested]), strict=True):
        d["holm"] = p
    for d in differences:
        d.setdefault("holm", None)


def _profile(values: Mapping[str, Values], level: float) -> dict[str, Any]:
    """The share of each arm's seeds above a score, for scores from the lowest to the highest."""
    every = [x for arm in values.values() for x in arm.values()]
    if len(every) < 2 or min(every) == max(every):
        return {}
    at = np.linspace(min(every), max(every), POINTS)
    made = {
        arm: [i.to_dict() for i in stats.performance_profile(list(x.values()), at, level=level, resamples=500)]
        for arm, x in values.items()
        if x
    }
    return {"at": [float(x) for x in at], "arms": made}


def _bands(runs: Sequence[RunRecord], arms: Sequence[str], curve: str, level: float) -> dict[str, Any]:
    """By arm: rollout, mean over seeds and its interval."""
    made = {}
    for arm in arms:
        lines = [run.curves[curve] for run in runs if run.arm == arm and curve in run.curves]
        columns = [
            [x for line in lines if i < len(line) and (x := line[i]) is not None] for i in range(_longest(lines))
        ]
        if lines:
            made[arm] = {"at": list(range(1, len(columns) + 1)), **_columns(columns, level)}
    return made


def _eval_bands(runs: Sequence[RunRecord], arms: Sequence[str], score: str, level: float) -> dict[str, Any]:
    """By arm: optimiser step, mean over seeds and its interval."""
    made = {}
    for arm in arms:
        points: dict[int, list[float]] = {}
        for run in runs:
            for e in run.evals if run.arm == arm else []:
                if (x := e.get(score)) is not None:
                    points.setdefault(int(e["step"] or 0), []).append(float(x))
        if points:
            made[arm] = {"at": sorted(points), **_columns([points[at] for at in sorted(points)], level)}
    return made


def _columns(columns: Sequence[Sequence[float]], level: float) -> dict[str, list[float | None]]:
    intervals = [stats.mean_interval(c, level).to_dict() if c else {} for c in columns]
    return {
        key: [i.get(name) for i in intervals] for key, name in (("value", "estimate"), ("low", "low"), ("high", "high"))
    }


def _longest(lines: Sequence[Sequence[float | None]]) -> int:
    return max((len(line) for line in lines), default=0)


def _bucket_means(runs: Sequence[RunRecord]) -> dict[str, float]:
    names = list(dict.fromkeys(name for run in runs for name in run.buckets))
    there = {name: [run.buckets[name] for run in runs if name in run.buckets] for name in names}
    return {name: sum(x) / len(x) for name, x in there.items()}
