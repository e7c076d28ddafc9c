"""The report of one or several runs: one HTML page that needs neither network nor any other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from markupsafe import Markup

from bandpo.lab import page
from bandpo.lab.report import figures
from bandpo.lab.report.runs import Run, by_arm, clip_label, read_runs
from bandpo.lab.run.records import Score, Step

REGION_TEXT = """Each dot is a token that was trained on, at its probability under the old policy and the ratio by
which the policy had moved it. Shaded: where the clip lets a token move; dashed: the limit r = 1/p. Both ends of the
axis of p are opened up. Tokens whose ratio was exactly 1 are left out; tokens beyond the frame are drawn on it."""
BUCKET_TEXT = (
    "Share of the bucket's tokens over the whole run: upwards A > 0 beyond the upper bound, downwards (paler) A < 0 "
    "beyond the lower bound."
)
KINDS = {
    "inside": "inside: full gradient",
    "up": "above and A > 0: zero gradient",
    "down": "below and A < 0: zero gradient",
    "inward": "outside, moving back: full gradient",
}
CURVES = [  # title, metric, whether it is a share, what it is
    ("Reward", "reward", False, "Mean training reward of each rollout."),
    ("Entropy", "entropy", False, "Mean entropy of the next token, in nats."),
    (
        "Zero-gradient share",
        "clipped",
        True,
        "Tokens that the clip left without gradient, mean over a rollout's updates.",
    ),
    ("… above the upper bound", "clip/zero_grad_above", True, "The part with A > 0 and r > high."),
    ("… below the lower bound", "clip/zero_grad_below", True, "The part with A < 0 and r < low."),
]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about some runs.

    Args:
        runs: output folders of ``bandpo train``; the first one is what the headline is about.
        out: the file to write; a file that is there is replaced.

    Returns:
        The path of the page.

    Raises:
        InputError: a folder holds no run, `out` cannot be written, or matplotlib is missing.
    """
    return page.write(render(read_runs([Path(run) for run in runs])), out)


def render(runs: Sequence[Run]) -> str:
    """Return the page about some runs as HTML; the first one is what the headline is about."""
    first = runs[0]
    return page.render(
        "report.html.j2",
        f"{_task(first)} with {first.name}: bandpo report",
        heading=f"{_task(first)}, trained with {first.name}",
        kicker=" · ".join(_kicker(first)),
        headline=_headline(first),
        said=list(_said(runs)),
        missing=[f"{run.name}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing],
        rows=[_row(run) for run in runs] if len(runs) > 1 else [],
        key=_key(runs) if len(runs) > 1 else [],
        smoothed=_smoothed(runs),
        curves=_curves(runs),
        regions=_regions(runs),
        kinds=[{"colour": figures.DOTS[kind], "text": text} for kind, text in KINDS.items()],
        region_text=REGION_TEXT,
        samples=[_samples(arm[0]) for arm in by_arm(runs) if arm[0].samples],
        repeat=_repeat(runs),
    )


# ---------------------------------------------------------------- the top of the page


def _kicker(run: Run) -> Iterable[str]:
    facts = run.facts
    if facts.model is not None:
        yield f"model {facts.model}"
    if facts.seed is not None:
        yield f"seed {facts.seed}"
    if run.steps:
        rollouts, updates = (
            len({record.rollout for record in run.steps} - {0}),
            f"{run.steps[-1].step:,} optimiser steps",
        )
        yield f"{rollouts:,} rollouts, {updates}" if rollouts else updates
    if finite(facts.seconds):
        yield duration(facts.seconds)
    if facts.workers is not None:
        yield f"{facts.engine}, {facts.workers} workers"


def _headline(run: Run) -> dict[str, Any]:
    before, after = run.facts.before, run.facts.after
    counts = {f"{score.n:,}" for score in (before, after) if score}
    intervals = f"95 % intervals {interval(before)} and {interval(after)}"
    if counts:
        intervals += f"; {' and '.join(sorted(counts))} completions to held-out prompts each time"
    label, ends = "Entropy, nats a token", [score.entropy if score else None for score in (before, after)]
    if ends == [None, None] and run.steps:  # verl's evaluations have none
        label, ends = f"{label}, training", [run.steps[0].entropy, run.steps[-1].entropy]
    record = "rollout" if run.facts.engine == "verl" else "update"  # verl logs the mean over a rollout's updates
    shares = [record.clipped for record in run.steps if finite(record.clipped)]
    return {
        "before": percent(before.accuracy if before else None),
        "after": percent(after.accuracy if after else None),
        "intervals": intervals,
        "facts": [
            (label, " → ".join(number(x) for x in ends)),
            ("Tokens with zero gradient, mean", percent(mean(shares), 2)),
            (f"Highest in one {record}", percent(max(shares, default=None), 2)),
        ],
    }


def _said(runs: Sequence[Run]) -> Iterable[str]:
    """Say what the numbers are, and what they are not."""
    facts = runs[0].facts
    before, after = facts.before, facts.after
    if facts.status not in (None, "done"):
        yield f"This run has not ended; its status is {facts.status}{f': {facts.error}' if facts.error else ''}."
    if before and after:
        apart = after.low > before.high or after.high < before.low
        change = after.accuracy - before.accuracy
        verb = "went up" if change > 0 else "went down" if change < 0 else "stayed the same"
        yield (
            f"Held-out accuracy {verb}; the intervals of before and after {'do not overlap' if apart else 'overlap'}. "
            "They cover the draw of prompts and completions, not another seed or another training run."
        )
    seeds: dict[str, set[str]] = {}
    for run in runs:
        seeds.setdefault(repr((run.facts.clip, run.facts.clip_args)), set()).add(str(run.facts.seed))
    least = min(map(len, seeds.values()))
    if len(seeds) == 1:
        yield "Nothing here compares this clip with another one."
    elif least > 1:
        yield f"{least} seeds an arm at least; this page draws each run and tests nothing."
    else:
        yield (
            "A clip with one seed only: a difference between such arms may be chance and proves nothing about the "
            "clips. Repeat every arm with several seeds before drawing a conclusion."
        )


def _row(run: Run) -> dict[str, Any]:
    """A run in the table of all of them."""
    facts, shares = run.facts, [record.clipped for record in run.steps if finite(record.clipped)]
    scores = {"before": facts.before, "after": facts.after}
    cells = {
        "seed": "–" if facts.seed is None else facts.seed,
        **{when: f"{percent(s.accuracy if s else None)}\n{interval(s)}" for when, s in scores.items()},
        "highest on the way": percent(max((score.accuracy for _, score in run.evaluations()), default=None)),
        "entropy after": number(facts.after.entropy if facts.after else None),
        "zero gradient": percent(mean(shares), 2),
        "time": duration(facts.seconds),
        "status": facts.status or "–",
    }
    return {"name": run.name, "chip": _chip(run.arm), "cells": cells}


# ---------------------------------------------------------------- figures


def _curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    drawn = [
        _figure(title, figures.curves(runs, title.strip("… "), _metric(name), percent=share), text)
        for title, name, share, text in CURVES
    ]
    held_out = "Prompts that training never sees; the band is the 95 % interval."
    return [drawn[0], _figure("Held-out accuracy", figures.accuracy(runs), held_out), *drawn[1:]]


def _metric(name: str) -> Callable[[Step], float]:
    return lambda record: record.number(name)


def _smoothed(runs: Sequence[Run]) -> int:
    return max((figures.smooth(figures.by_rollout(run, _metric("reward"))[1])[1] for run in runs), default=1)


def _regions(runs: Sequence[Run]) -> dict[str, Any]:
    """The tokens of each arm's first run at its clip's region, and the shares by bucket."""
    firsts = [arm[0] for arm in by_arm(runs)]
    frame = figures.frame(firsts)
    found = [drawn for run in firsts if (drawn := _region(run, *frame))]
    bars = figures.buckets(runs)
    title = "Zero-gradient share by old probability"
    return {"regions": found, "buckets": [_figure(title, bars, BUCKET_TEXT)] if bars else []}


def _region(run: Run, left: float, reach: float) -> dict[str, Any] | None:
    try:
        drawn = figures.region(run, left, reach)
    except Exception as error:  # a clip of another version, or of a file that is gone
        return _figure(run.name, None, f"This clip cannot be drawn here: {error}.")
    if drawn is None:
        return None
    svg, counts = drawn
    total = sum(counts.values())
    shares = {kind: percent(count / total) for kind, count in counts.items()}
    return _figure(
        run.name, svg,
        f"{total:,} tokens; zero gradient: {shares['up']} above, {shares['down']} below. Outside, but moving back: "
        f"{shares['inward']}.",
    )  # fmt: skip


def _figure(title: str, svg: str | None, caption: str) -> dict[str, Any]:
    return {"title": title, "svg": Markup(svg) if svg else None, "caption": caption}


def _key(runs: Sequence[Run]) -> list[dict[str, Any]]:
    def name(arm: list[Run]) -> str:
        return arm[0].name if len(arm) == 1 else f"{clip_label(arm[0].facts)} ({len(arm)} runs)"

    return [{"chip": _chip(arm[0].arm), "text": name(arm)} for arm in by_arm(runs)]


def _chip(i: int) -> dict[str, str]:
    name, dashed = figures.colour_name(i)
    return {"name": name, "style": "dashed" if dashed else "solid"}


# ---------------------------------------------------------------- tables


def _samples(run: Run) -> dict[str, Any]:
    marks = {True: "✓", False: "✗", None: ""}
    rows = [
        {
            "prompt": _prompt(sample.prompt),
            "answer": sample.answer,
            "before": (marks[sample.correct_before], "" if sample.before is None else sample.before),
            "after": (marks[sample.correct_after], "" if sample.after is None else sample.after),
        }
        for sample in run.samples
    ]
    return {"name": run.name, "rows": rows}


def _prompt(prompt: object) -> str:
    """Return a prompt as text: a string, or chat messages."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)
    return str(prompt)


def _repeat(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Give the command and, where they differ from the first run's, recipe, versions and machine of every run."""
    parts, seen = [], set[str]()
    for run in runs:
        facts = run.facts
        rows = [("seed", facts.seed), ("commit", facts.commit), *facts.versions.items(), *facts.machine.items()]
        part = {
            "command": facts.command,
            "origin": [(name, value) for name, value in rows if value is not None],
            "recipe": run.recipe,
        }
        new = {name: value for name, value in part.items() if value and repr((name, value)) not in seen}
        seen.update(repr(item) for item in new.items())
        if new:
            parts.append({"name": run.name, **dict.fromkeys(part), **new})
    return parts


# ---------------------------------------------------------------- small things


def _task(run: Run) -> str:
    return run.facts.task or run.folder.name


def finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None of nothing."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def percent(value: object, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * value:.{digits}f} %" if finite(value) else "–"


def number(value: object) -> str:
    """A number with two digits."""
    return f"{value:.2f}" if finite(value) else "–"


def interval(score: Score | None) -> str:
    """An evaluation's interval in per cent."""
    known = score is not None and finite(score.low) and finite(score.high)
    return f"{100 * score.low:.1f} to {100 * score.high:.1f}" if score and known else "not recorded"


def duration(seconds: object) -> str:
    """A time in words."""
    if not finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
