"""The bounds of some clips against the old probability: the picture of the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

import bandpo
from bandpo.clips.base import Region
from bandpo.plots.look import COLOURS, DASHED, INK, MUTED, RC, RULE, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def readme_clips() -> dict[str, Region]:
    """Return the clips of the README's picture, by the name in its legend."""
    return {
        "Band, kl 0.05": bandpo.Band(divergence="kl", delta=0.05, cap=None),
        "fixed 0.2 / 0.2": bandpo.Fixed(eps_low=0.2, eps_high=0.2),
        "Clip-Higher 0.2 / 0.28": bandpo.Fixed(eps_low=0.2, eps_high=0.28),
    }


def draw_bounds(clips: Mapping[str, Region], points: tuple[float, ...] = ()) -> Figure:
    """Draw the bounds of some clips against the old probability p: as ratios, and as the probability they reach.

    Args:
        clips: by the name for the legend; the first one is filled.
        points: old probabilities in (0, 1) to mark on the first clip.

    Returns:
        A matplotlib figure of two panels.

    Raises:
        InputError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(10, 4.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        _ratio_panel(left, clips, points)
        _reach_panel(right, clips, points)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _ratio_panel(axes: Axes, clips: Mapping[str, Region], points: tuple[float, ...]) -> None:
    """Ratio bounds against p, both on log axes."""
    p = torch.logspace(-4, 0, 201, dtype=torch.float64)[:-1]
    for i, (name, clip) in enumerate(clips.items()):
        bounds = clip.bounds(p.log())
        low, high = bounds.low.clamp(min=1e-3), bounds.high.clamp(max=1e3)
        _edges(axes, i, p, low, high, name)
    _mark(axes, clips, points, reach=False)
    axes.plot(p, 1 / p, color=INK, linewidth=1, linestyle=DASHED)
    axes.text(0.022, 52, "limit of the simplex: r = 1/p", fontsize=9, color=MUTED)
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(0.1, 100), title="How far the ratio may go")
    axes.set(xlabel="old probability p of the token", ylabel="ratio r = q / p")
    axes.set_xticks([1e-3, 1e-2, 1e-1, 1], ["0.001", "0.01", "0.1", "1"])
    axes.set_yticks([0.1, 0.5, 1, 2, 10, 100], ["0.1", "0.5", "1", "2", "10", "100"])


def _reach_panel(axes: Axes, clips: Mapping[str, Region], points: tuple[float, ...]) -> None:
    """The new probability that the bounds allow, p·low to p·high, on linear axes."""
    p = torch.linspace(0, 1, 201, dtype=torch.float64)[1:-1]
    for i, clip in enumerate(clips.values()):
        bounds = clip.bounds(p.log())
        _edges(axes, i, p, p * bounds.low, p * bounds.high, "")
    _mark(axes, clips, points, reach=True)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
    axes.axhline(1, color=INK, linewidth=1, linestyle=DASHED)
    axes.axhspan(1, 1.2, color=RULE, alpha=0.5, linewidth=0)
    axes.text(0.02, 1.03, "no probability: these bounds never bind", fontsize=9, color=MUTED)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    axes.set(xlim=(0, 1), ylim=(0, 1.1), title="Which probability the token may reach")
    axes.set(xlabel="old probability p of the token", ylabel="new probability q")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])


def _edges(axes: Axes, i: int, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, name: str) -> None:
    """Both bounds of clip `i`; the first is filled, the third and later ones dashed so that none hides."""
    style = "-" if i < 2 else DASHED
    axes.plot(x, high, color=COLOURS[i % len(COLOURS)], linestyle=style, label=name or None)
    axes.plot(x, low, color=COLOURS[i % len(COLOURS)], linestyle=style)
    if i == 0:
        axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.12, linewidth=0)


def _mark(axes: Axes, clips: Mapping[str, Region], points: tuple[float, ...], *, reach: bool) -> None:
    """Mark the first clip's bounds at some probabilities."""
    p = torch.tensor(points, dtype=torch.float64)
    bounds = next(iter(clips.values())).bounds(p.log())
    scale = p if reach else torch.ones_like(p)
    for side in (bounds.low, bounds.high):
        axes.plot(p, scale * side, "o", color=COLOURS[0], markersize=5, zorder=4)
