"""The figures of a report, each one an SVG that goes inline into the page and follows its light or dark colours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from bandpo import Region, get_clip
from bandpo.lab.page.svg import inline
from bandpo.lab.report.runs import Run, by_arm
from bandpo.lab.run.records import Step
from bandpo.loss.stats import BUCKETS
from bandpo.plots import COLOURS, DASHED, MUTED, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Dots are one embedded bitmap (20,000 of them as vectors would be megabytes), so their colours must do on both themes.
DOTS = {"inside": "#8791a0", "inward": "#c99700", "up": "#0d9f88", "down": "#d8447f"}
SMOOTH_FROM = 20
RIGHT = 2e-4  # how near to 1 the axis of p goes


def by_rollout(run: Run, value: Callable[[Step], float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the last optimiser step of each rollout and a quantity's mean over its finite values there.

    Rollouts without a finite value are left out.
    """
    groups: dict[int, list[tuple[int, float]]] = {}
    for record in run.steps:
        groups.setdefault(record.rollout or -record.step, []).append((record.step, value(record)))
    points = []
    for group in groups.values():
        finite = [v for _, v in group if math.isfinite(v)]
        if finite:
            points.append((max(step for step, _ in group), sum(finite) / len(finite)))
    steps = sorted(points)
    return np.array([s for s, _ in steps], dtype=float), np.array([v for _, v in steps], dtype=float)


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the centred running mean of a curve and its window in points, odd; 1 when the curve is too short."""
    window = max(1, len(values) // 12) | 1
    if len(values) < SMOOTH_FROM or window < 3:
        return values, 1
    half = window // 2
    mean = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    return np.array(mean), window


def curves(runs: Sequence[Run], title: str, value: Callable[[Step], float], *, percent: bool = False) -> str | None:
    """Draw one quantity of the training log against the optimiser step, a line for each run; None where no run has it.

    Runs of one arm share a colour; `value` gives a record's quantity, or NaN.
    """
    with rc_context(RC):
        figure, axes = _panel()
        drawn = False
        for run in runs:
            steps, values = by_rollout(run, value)
            if len(values) == 0:
                continue
            drawn = True
            mean, window = smooth(values)
            if window > 1:
                axes.plot(steps, values, color=_colour(run.arm), linewidth=0.8, alpha=0.35)
            axes.plot(
                steps, mean, color=_colour(run.arm), linestyle=_style(run.arm), marker="o" if len(values) == 1 else ""
            )
        axes.set_xlim(left=0)
        if percent:
            axes.yaxis.set_major_formatter(_share)
            axes.set_ylim(bottom=0)
        return inline(figure, title) if drawn else None


def accuracy(runs: Sequence[Run]) -> str | None:
    """Draw held-out accuracy with its 95 % interval against the optimiser step; None without any evaluation."""
    with rc_context(RC):
        figure, axes = _panel()
        drawn = False
        for run in runs:
            points = [(step, e) for step, e in run.evaluations() if math.isfinite(e.accuracy)]
            if not points:
                continue
            drawn = True
            steps, colour = [step for step, _ in points], _colour(run.arm)
            axes.plot(
                steps,
                [e.accuracy for _, e in points],
                color=colour,
                linestyle=_style(run.arm),
                marker="o",
                markersize=4,
            )
            low, high = [e.low for _, e in points], [e.high for _, e in points]
            axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.yaxis.set_major_formatter(_share)
        axes.set_ylim(0, 1)
        return inline(figure, "Held-out accuracy") if drawn else None


def buckets(runs: Sequence[Run]) -> str | None:
    """Draw the zero-gradient share by old probability: A > 0 upwards, A < 0 downwards; None where none was recorded."""
    arms = by_arm(runs)
    rates = [[bucket_rates(arm, bucket) for bucket in BUCKETS] for arm in arms]
    if not any(math.isfinite(above) for arm in rates for above, _, _ in arm):
        return None
    with rc_context(RC):
        figure, axes = _panel(size=(5.0, 3.7))
        width = 0.8 / len(arms)
        for i, arm in enumerate(rates):
            place, colour = np.arange(len(BUCKETS)) - 0.4 + width * (i + 0.5), _colour(arms[i][0].arm)
            axes.bar(place, [above for above, _, _ in arm], 0.92 * width, color=colour)
            axes.bar(place, [-below for _, below, _ in arm], 0.92 * width, color=colour, alpha=0.55)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        shares = [f"{share:.0%}" if math.isfinite(share) else "–" for _, _, share in rates[0]]
        shares[0] += " of tokens"
        names = [f"{bucket[1:].replace('-', '–')}\n{share}" for bucket, share in zip(BUCKETS, shares, strict=True)]
        axes.set_xticks(range(len(BUCKETS)), names)
        axes.yaxis.set_major_formatter(_share)
        axes.set_xlabel("old probability p")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
        return inline(figure, "Zero-gradient share by old probability")


def bucket_rates(arm: Sequence[Run], bucket: str) -> tuple[float, float, float]:
    """Return a bucket's zero-gradient shares above and below and its share of all tokens, over an arm's updates."""
    names = ("share", "zero_grad_above", "zero_grad_below")
    rows = np.array([[record.number(f"clip/{name}/{bucket}") for name in names] for run in arm for record in run.steps])
    rows = rows.reshape(-1, 3)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) == 0:
        return math.nan, math.nan, math.nan
    share, above, below = rows.T
    tokens = max(share.sum(), 1e-12)
    return float(share @ above / tokens), float(share @ below / tokens), float(share.mean())


def frame(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the least p and the greatest ratio that the region of each of these runs shows, one frame for all."""
    old = [run.tokens["old_logps"] for run in runs if run.tokens is not None]
    moved = [np.abs(run.tokens["logps"] - run.tokens["old_logps"]) for run in runs if run.tokens is not None]
    least = min((float(np.quantile(x, 0.001)) for x in old if len(x)), default=-2.0)
    reach = max((float(np.quantile(x, 0.99)) for x in moved if len(x)), default=1.0)
    return 10.0 ** min(-2, max(-6, math.floor(least / math.log(10)))), 1.15 * math.exp(min(max(reach, 0.6), 3.0))


def region(run: Run, left: float, reach: float) -> tuple[str, dict[str, int]] | None:
    """Draw a run's clip region over the tokens it really saw: ratio (log axis) against old probability (logit axis).

    Args:
        run: a run with tokens.
        left: least probability shown; tokens beyond are drawn on the frame.
        reach: greatest ratio shown, and the inverse of the least.

    Returns:
        An ``<svg>`` element and the number of tokens by kind; None without tokens, or for a clip that is no region.
    """
    if run.tokens is None or len(run.tokens["old_logps"]) == 0:
        return None
    clip = get_clip(run.facts.clip or "band", **run.facts.clip_args)
    if not isinstance(clip, Region) or not clip.as_bounds:
        return None
    old, ratio, kinds = _kinds(run.tokens, clip)
    p = np.exp(old).clip(left, 1 - RIGHT)
    with rc_context(RC):
        figure, axes = _panel(size=(5.0, 3.7))
        _boundary(axes, clip, left, reach)
        for kind, colour in DOTS.items():
            chosen = kinds == kind
            size, alpha = (3, 0.35) if kind == "inside" else (6, 0.8)
            x, y = p[chosen], ratio[chosen].clip(1 / reach, reach)
            axes.scatter(x, y, s=size, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        _scales(axes, left, reach)
        counts = {kind: int((kinds == kind).sum()) for kind in DOTS}
        return inline(figure, f"Clip region and tokens of {re.sub('[^a-z0-9. ]', ' ', run.name.lower())}"), counts


def _scales(axes: Axes, left: float, reach: float) -> None:
    """Set p from `left` to nearly 1, both ends opened up, and r from 1/reach to reach; ticks are plain numbers."""
    axes.set(xlim=(left, 1 - RIGHT), ylim=(1 / reach, reach), xscale="logit", yscale="log")
    ticks = [t for t in (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999) if t >= left]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    fine = (0.25, 0.5, 0.8, 1, 1.25, 2, 4)
    marks = [t for t in (fine if reach < 6 else (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 10, 20)) if 1 / reach <= t <= reach]
    axes.set_yticks(marks, [f"{t:g}" for t in marks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="old probability p", ylabel="ratio r")


def _kinds(tokens: dict[str, np.ndarray], clip: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return old log-probability, ratio and kind of every token."""
    old, advantages = tokens["old_logps"].astype(float), tokens["advantages"]
    log_ratio = np.clip(tokens["logps"] - old, -30, 30)
    bounds = clip.bounds(torch.from_numpy(old).float())
    above = log_ratio > bounds.log_high.numpy()
    below = log_ratio < bounds.log_low.numpy()
    kinds = np.full(len(old), "inside", dtype="<U6")
    kinds[above | below] = "inward"
    kinds[above & (advantages > 0)] = "up"
    kinds[below & (advantages < 0)] = "down"
    return old, np.exp(log_ratio), kinds


def _boundary(axes: Axes, clip: Region, left: float, reach: float) -> None:
    """Draw the clip's region and the limit of the simplex."""
    odds = np.linspace(math.log(left), -math.log(RIGHT), 400)
    p = 1 / (1 + np.exp(-odds))
    bounds = clip.bounds(torch.from_numpy(np.log(p)).double())
    low = bounds.low.clamp(min=0.5 / reach).numpy()
    high = bounds.high.clamp(max=2 * reach).numpy()
    axes.fill_between(p, low, high, color=COLOURS[0], alpha=0.10, linewidth=0)
    axes.plot(p, high, color=COLOURS[0], linewidth=1.4)
    axes.plot(p, low, color=COLOURS[0], linewidth=1.4)
    axes.plot(p, 1 / p, color=MUTED, linewidth=1, linestyle=DASHED)


def _panel(size: tuple[float, float] = (5.0, 3.0)) -> tuple[Figure, Axes]:
    """An empty panel in the report's look; inside ``rc_context(RC)``."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure, axes


def colour_name(i: int) -> tuple[str, bool]:
    """Return the CSS variable of arm `i`'s colour, and whether its line is dashed."""
    return f"c{i % len(COLOURS)}", i >= len(COLOURS)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _style(i: int) -> object:
    return DASHED if colour_name(i)[1] else "-"


def _share(value: float, _: float) -> str:
    """A tick of a share; one below zero is drawn downwards but is no negative share."""
    return f"{100 * abs(value):.3g} %"
