"""The figures of a study's report: curves with bands over seeds, differences, profiles, reward against entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bandpo.lab.page.svg import inline
from bandpo.plots import COLOURS, DASHED, MUTED, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = (0, 1, 2, 3, 5)  # of `COLOURS`; the fourth is too near the reference's grey


def look(arms: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Return each arm's colour and line; the reference is grey and dashed.

    Args:
        arms: the arms of the whole study, so that an arm looks the same in every setting.
        reference: the arm that others are compared with.

    Returns:
        By arm: colour, dash (of matplotlib), css (a variable) and style (of CSS).
    """
    made, place = {}, 0
    for arm in arms:
        if arm == reference:
            made[arm] = {"colour": MUTED, "dash": DASHED, "css": "var(--muted)", "style": "dashed"}
            continue
        number, dotted = SERIES[place % len(SERIES)], place >= len(SERIES)
        dash: Any = (0, (1, 1.2)) if dotted else "-"
        style = "dotted" if dotted else "solid"
        made[arm] = {"colour": COLOURS[number], "dash": dash, "css": f"var(--c{number})", "style": style}
        place += 1
    return made


def bands(
    curves: Mapping[str, Any], looks: Mapping[str, Any], label: str, x: str, *, share: bool = False
) -> str | None:
    """Draw means over seeds with their intervals.

    Args:
        curves: by arm: at, value, low, high.
        looks: from `look`.
        label: what it shows.
        x: name of the horizontal axis.
        share: whether it is a share.

    Returns:
        An ``<svg>`` element; None where no run recorded it.
    """
    there = {arm: c for arm, c in curves.items() if any(v is not None for v in c["value"])}
    if not there:
        return None
    with rc_context(RC):
        figure, axes = _panel()
        for arm, c in there.items():
            points = [
                (a, v, lo, hi)
                for a, v, lo, hi in zip(c["at"], c["value"], c["low"], c["high"], strict=True)
                if v is not None
            ]
            at, value = [p[0] for p in points], [p[1] for p in points]
            axes.plot(
                at, value, color=looks[arm]["colour"], linestyle=looks[arm]["dash"], marker="o" if len(at) == 1 else ""
            )
            if all(p[2] is not None for p in points):
                low, high = [p[2] for p in points], [p[3] for p in points]
                axes.fill_between(at, low, high, color=looks[arm]["colour"], alpha=0.13, linewidth=0)
        axes.set_ylim(*_window(list(there.values())))
        axes.set_xlabel(x)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        return inline(figure, _plain(label))


def _window(curves: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The lines with their bands; of bands as wide as two seeds have, only as much as the lines are high, each side."""
    lines = [v for c in curves for v in c["value"] if v is not None]
    ends = [v for c in curves for v in (*c["low"], *c["high"]) if v is not None]
    low, high = min(lines), max(lines)
    height = (high - low) or max(abs(high), 1e-3) / 10
    low, high = max(min([low, *ends]), low - height), min(max([high, *ends]), high + height)
    return low - 0.05 * height, high + 0.05 * height


def against(curves: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Any], label: str) -> str | None:
    """Draw the mean training reward against the mean entropy, rollout by rollout; a dot is the end.

    Args:
        curves: "reward" and "entropy", each by arm.
        looks: from `look`.
        label: what it shows.

    Returns:
        An ``<svg>`` element; None where a curve is missing.
    """
    both = [arm for arm in curves["reward"] if arm in curves["entropy"]]
    if not both:
        return None
    with rc_context(RC):
        figure, axes = _panel()
        for arm in both:
            pairs = zip(curves["entropy"][arm]["value"], curves["reward"][arm]["value"], strict=False)
            points = [(e, r) for e, r in pairs if e is not None and r is not None]
            if points:
                x, y = _smoothed([p[0] for p in points]), _smoothed([p[1] for p in points])
                axes.plot(x, y, color=looks[arm]["colour"], linestyle=looks[arm]["dash"], linewidth=1.4)
                axes.plot(x[-1:], y[-1:], "o", color=looks[arm]["colour"], markersize=5)
        axes.set_xlabel("entropy, nats")
        axes.set_ylabel("training reward")
        return inline(figure, _plain(label))


def profile(found: Mapping[str, Any], looks: Mapping[str, Any], label: str, x: str) -> str | None:
    """Draw the share of seeds above each score.

    Args:
        found: "at", and "arms": an interval at each score.
        looks: from `look`.
        label: what it shows.
        x: the score's name.

    Returns:
        An ``<svg>`` element; None without scores.
    """
    if not found:
        return None
    with rc_context(RC):
        figure, axes = _panel()
        for arm, points in found["arms"].items():
            shares = [p["estimate"] for p in points]
            axes.plot(found["at"], shares, color=looks[arm]["colour"], linestyle=looks[arm]["dash"])
            if points[0]["low"] is not None:
                low, high = [p["low"] for p in points], [p["high"] for p in points]
                axes.fill_between(found["at"], low, high, color=looks[arm]["colour"], alpha=0.1, linewidth=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel=x, ylabel="seeds above it", ylim=(0, 1.03))
        return inline(figure, _plain(label))


def forest(differences: Mapping[str, Any], looks: Mapping[str, Any], label: str, margin: float | None) -> str | None:
    """Draw each arm's difference from the reference with its interval, over the margin where one was given.

    Args:
        differences: by arm: mean, low, high.
        looks: from `look`.
        label: what it shows.
        margin: the largest difference that does not matter; None without.

    Returns:
        An ``<svg>`` element; None without a difference.
    """
    there = {arm: d for arm, d in differences.items() if d["mean"] is not None}
    if not there:
        return None
    with rc_context(RC):
        figure, axes = _panel(height=0.9 + 0.34 * len(there))
        if margin is not None:
            axes.axvspan(-margin, margin, color=MUTED, alpha=0.13, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for i, (arm, d) in enumerate(there.items()):
            if d["low"] is not None:
                axes.plot([d["low"], d["high"]], [i, i], color=looks[arm]["colour"], linewidth=3, alpha=0.45)
            axes.plot([d["mean"]], [i], "o", color=looks[arm]["colour"], markersize=5)
        axes.set_yticks(range(len(there)), [_plain(arm) for arm in there])
        axes.set_ylim(len(there) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        return inline(figure, _plain(label))


def _smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """A centred running mean, narrower at the ends."""
    if len(values) < 3 * window:
        return list(values)
    reach = [min(i, len(values) - 1 - i, window // 2) for i in range(len(values))]
    return [sum(values[i - k : i + k + 1]) / (2 * k + 1) for i, k in enumerate(reach)]


def _panel(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, height), layout="constrained")
    return figure, figure.subplots()


def _plain(text: str) -> str:
    """Text without characters that mean something in SVG or to matplotlib."""
    return "".join(c if c.isalnum() or c in " .,_+@:" else " " for c in text).replace("_", " ")
