"""Every region of the registry over the old probability, on one page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bandpo.clips import get_clip, list_clips
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds
from bandpo.plots.lines import Points, thin
from bandpo.plots.look import DASHED, LIGHT, Theme, need_matplotlib
from bandpo.plots.surface import Slice, limits, slices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USUAL = "clip_higher"  # drawn dashed in every panel, to compare with
LEAST_P, LEAST_R, MOST_R = 1e-3, 0.03, 100.0


def boundaries(names: Sequence[str] | None = None) -> list[tuple[list[str], list[tuple[Slice, Bounds]]]]:
    """Return the different boundaries among clips, each with the names of all clips that have it.

    Args:
        names: in the registry; None for all of it. A clip without a region is left out.

    Returns:
        The names, and for each slice the bounds at the probabilities of `probabilities`.
    """
    found: list[tuple[list[str], list[tuple[Slice, Bounds]]]] = []
    for name in list_clips() if names is None else names:
        clip = get_clip(name)
        region = clip.boundary
        if region is None:
            continue
        pieces = slices(clip) if isinstance(clip, Region) else slices(region)
        bounds = [(piece, limits(region, piece, probabilities().log())) for piece in pieces]
        for others, known in found:
            if len(known) == len(bounds) and all(_same(a, b) for (_, a), (_, b) in zip(known, bounds, strict=True)):
                others.append(name)
                break
        else:
            found.append(([name], bounds))
    return found


def probabilities() -> torch.Tensor:
    """Return the old probabilities at which regions are drawn."""
    return torch.logspace(-3, 0, 151, dtype=torch.float64)[:-1]


def draw_regions(theme: Theme = LIGHT, names: Sequence[str] | None = None) -> Figure:
    """Draw the ratio bounds of every region against the old probability, a panel for each.

    Args:
        theme: the colours.
        names: in the registry; None for all of it.

    Returns:
        A matplotlib figure.

    Raises:
        InputError: matplotlib is not installed, an unknown clip.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = boundaries(names)
    (_, [(_, usual)]), *_ = boundaries([USUAL])
    columns = 3
    rows = -(-len(drawn) // columns)
    with rc_context(theme.rc | {"font.size": 8, "axes.titlesize": 8.5, "lines.linewidth": 1.3}):
        figure = Figure(figsize=(6.4, 1.75 * rows + 0.5), facecolor="white")
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04))
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
        for panel, (same, bounds) in zip(panels, drawn, strict=False):
            panel.set_title(same[0], pad=3)
            notes = [f"also {', '.join(same[1:])}"] if same[1:] else []
            _region(panel, bounds, usual, theme, notes)
        for panel in panels[len(drawn) :]:
            panel.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, labelcolor=theme.ink)
        figure.supxlabel("old probability p", fontsize=9, color=theme.muted)
        figure.supylabel("ratio r = q / p", fontsize=9, color=theme.muted)
    return figure


def _region(panel: Axes, bounds: list[tuple[Slice, Bounds]], usual: Bounds, theme: Theme, notes: list[str]) -> None:
    """One panel: the region filled, the usual one dashed, the simplex's edge."""
    for i, (piece, b) in enumerate(bounds):
        colour = theme.colours[(0, 2)[i]]
        low, high = _line(b.low), _line(b.high)
        around = np.concatenate([low, high[::-1]])
        panel.fill(*around.T, color=colour, alpha=0.22, linewidth=0, label=None if i else "allowed")
        for edge in (low, high):
            panel.plot(*edge.T, color=colour)
        if piece.title and len(bounds) > 1:
            place: dict[str, Any] = {"color": colour, "fontsize": 6.5, "transform": panel.transAxes}
            panel.text(0.03, 0.04 + 0.1 * i, piece.title, **place)
    for label, usually in (("clip_higher", usual.low), ("", usual.high)):
        style: dict[str, Any] = {"color": theme.colours[1], "linestyle": DASHED, "linewidth": 0.9}
        panel.plot(*_line(usually).T, **style, label=label or None)
    dots: dict[str, Any] = {"color": theme.ink, "linewidth": 0.8, "linestyle": (0, (1, 1.5))}
    panel.plot([LEAST_P, 1], [1 / LEAST_P, 1], **dots, label="r = 1/p, limit of the simplex")
    for note in notes:
        place = {"ha": "right", "va": "top", "fontsize": 6.5, "color": theme.muted, "transform": panel.transAxes}
        panel.text(0.98, 0.96, "\n".join(textwrap.wrap(note, 16)), **place)
    panel.set(xscale="log", yscale="log", xlim=(LEAST_P, 1), ylim=(LEAST_R, MOST_R))
    panel.set_xticks([1e-3, 1e-2, 1e-1, 1], ["0.001", "0.01", "0.1", "1"])
    panel.grid(False)
    panel.patch.set_visible(False)
    panel.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])


def _line(ratios: torch.Tensor) -> Points:
    """The bounds at `probabilities` as a line of few points."""
    log_r = ratios.clamp(LEAST_R / 2, MOST_R * 2).log10()
    return np.power(10.0, thin(probabilities().log10(), log_r, 3.0, math.log10(MOST_R / LEAST_R)))


def _same(a: Bounds, b: Bounds) -> bool:
    return torch.equal(a.log_low, b.log_low) and torch.equal(a.log_high, b.log_high)
