"""Heat maps of c / A over old probability and ratio: one clip, or all of them on one page."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bandpo.clips import get_clip
from bandpo.plots.lines import crossings
from bandpo.plots.look import LIGHT, Theme, need_matplotlib
from bandpo.plots.surface import LOW_P, MOST_R, SIZE, axes, is_flat, slices, surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINE = 3  # cells of an array to a pixel of its picture, each way
MOST_C, LINEAR = 20.0, 0.5  # the colours: asinh(c / LINEAR), cut at MOST_C
EXTENT = (math.log10(LOW_P), 0.0, -math.log10(MOST_R), math.log10(MOST_R))
P_TICKS, R_TICKS = (0.001, 0.01, 0.1, 1.0), (0.1, 0.5, 1.0, 2.0, 10.0)
LABEL = "c / A   (1 = on-policy gradient)"


def draw_clip(name: str, theme: Theme = LIGHT) -> Figure:
    """Draw c / A of one clip, for A > 0 and for A < 0, a row for each of its slices.

    Args:
        name: in the registry.
        theme: the colours.

    Returns:
        A matplotlib figure.

    Raises:
        InputError: matplotlib is not installed, an unknown clip.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    clip = get_clip(name)
    pieces = slices(clip)
    with rc_context(theme.rc | {"font.size": 9, "axes.titlesize": 9.5}):
        figure = Figure(
            figsize=(5.8, 0.75 + 2.35 * len(pieces)), layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05)
        )
        panels = figure.subplots(len(pieces), 2, squeeze=False, sharex=True, sharey=True)
        for i, (row, piece) in enumerate(zip(panels, pieces, strict=True)):
            for panel, sign in zip(row, (1.0, -1.0), strict=True):
                said = f"A {'>' if sign > 0 else '<'} 0" + (f", {piece.title}" if len(pieces) > 1 else "")
                panel.set_title(said)
                _heat(panel, name, i, sign, theme, SIZE)
        for panel in panels[:, 0]:
            panel.set_ylabel("ratio r = q / p")
        for panel in panels[-1]:
            panel.set_xlabel("old probability p")
        _key(figure, panels.ravel().tolist(), theme)
    return figure


def draw_atlas(names: Sequence[str], sign: float, theme: Theme = LIGHT) -> Figure:
    """Draw c / A of many clips on the same axes, for one sign of A, a panel for each slice.

    Args:
        names: in the registry.
        sign: of A, 1 or -1.
        theme: the colours.

    Returns:
        A matplotlib figure.

    Raises:
        InputError: matplotlib is not installed, an unknown clip.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = [(name, j, piece) for name in names for j, piece in enumerate(slices(get_clip(name)))]
    columns = 4
    rows = -(-len(drawn) // columns)
    with rc_context(theme.rc | {"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(6.4, 1.37 * rows + 0.9), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
        parts: Any = figure.subfigures(2, 1, height_ratios=[0.55, 1.37 * rows + 0.35])
        top, below = parts
        panels = below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
        for i, (panel, (name, j, piece)) in enumerate(zip(panels, drawn, strict=False)):
            panel.set_title(name, pad=3)
            if len(slices(get_clip(name))) > 1:
                panel.text(0.03, 0.03, piece.title, transform=panel.transAxes, fontsize=6.5, color=theme.ink)
            _heat(panel, name, j, sign, theme, 49)
            last = i + columns >= len(drawn)
            panel.tick_params(bottom=last, labelbottom=last, left=i % columns == 0)
        for panel in panels[len(drawn) :]:
            panel.set_axis_off()
        below.supxlabel("old probability p", fontsize=9, color=theme.muted)
        below.supylabel("ratio r = q / p", fontsize=9, color=theme.muted)
        _key(top, [], theme)
    return figure


@functools.lru_cache(maxsize=8)
def _array(name: str, which: int, sign: float, size: int) -> tuple[Tensor, int]:
    """The array of a clip in one of its slices, and how many of its cells each way are one pixel of `size`."""
    clip = get_clip(name)
    piece = slices(clip)[which]
    fine = FINE if clip.looks_at != "batch" or is_flat(clip, piece) else 1  # there every cell is a batch
    return surface(clip, piece, sign, size * fine), fine


def _heat(panel: Axes, name: str, which: int, sign: float, theme: Theme, size: int) -> None:
    """One heat map, with its zero set outlined and what no probability reaches hatched."""
    array, fine = _array(name, which, sign, size)
    panel.imshow(_paint(array, theme, fine), extent=EXTENT, origin="lower", aspect="auto", interpolation="none")
    log_p, log_r = (x / math.log(10) for x in axes(size * fine))
    lost = torch.where(array.isnan(), array, (array == 0).double() - 0.5)
    for edge in (_pool(lost, fine), array):
        if bool((edge > 0).any()) and bool((edge < 0).any()):
            grid = (_pool(log_p, fine), _pool(log_r, fine)) if len(edge) == size else (log_p, log_r)
            for line in crossings(*grid, edge, EXTENT[1] - EXTENT[0], EXTENT[3] - EXTENT[2]):
                panel.plot(*line.T, color=theme.ink, linewidth=0.9)
    simplex = [-EXTENT[3], 0.0], [EXTENT[3], 0.0]
    panel.fill_between(*simplex, EXTENT[3], facecolor="none", edgecolor=theme.rule, hatch="////", linewidth=0)
    panel.plot(*simplex, color=theme.muted, linewidth=0.8)
    panel.axhline(0, color=theme.muted, linewidth=0.6, linestyle=(0, (2, 2)))
    panel.set_xticks([math.log10(p) for p in P_TICKS], [f"{p:g}" for p in P_TICKS])
    panel.set_yticks([math.log10(r) for r in R_TICKS], [f"{r:g}" for r in R_TICKS])
    panel.set(xlim=EXTENT[:2], ylim=EXTENT[2:])
    panel.grid(False)
    panel.patch.set_visible(False)


def _pool(x: Tensor, size: int) -> Tensor:
    """The mean of every `size` neighbours, in each of the first two dimensions that is long."""
    x = x.reshape(-1, size, *x.shape[1:]).mean(1)
    return x.reshape(len(x), -1, size, *x.shape[2:]).mean(2) if x.dim() > 1 else x


def _paint(array: Tensor, theme: Theme, fine: int) -> Any:
    """The array as colours, `fine` cells each way to a pixel, so that edges are smooth; nothing where q > 1."""
    colours = _colours(theme)
    painted = torch.from_numpy(colours["cmap"](colours["norm"](array.nan_to_num().numpy())))
    painted[array == 0] = torch.tensor(_rgba(theme.none), dtype=painted.dtype)
    painted[array.isnan()] = torch.tensor([*_rgba(theme.none)[:3], 0.0], dtype=painted.dtype)
    return _pool(painted, fine).mul(255).round().byte().numpy()


def _rgba(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return tuple(to_rgba(colour))


def _colours(theme: Theme) -> dict[str, Any]:
    """How numbers become colours: with A on one side of 0, against A on the other; 0 itself has a colour of its own."""
    from matplotlib.colors import AsinhNorm, LinearSegmentedColormap

    one = 0.5 + 0.5 * math.asinh(1 / LINEAR) / math.asinh(MOST_C / LINEAR)  # where c / A = 1 is
    stops = (0.0, 1 - one, 0.5, 0.5, one, 1.0)
    ramp = LinearSegmentedColormap.from_list("c", list(zip(stops, theme.heat, strict=True)), N=512)
    return {"cmap": ramp, "norm": AsinhNorm(LINEAR, vmin=-MOST_C, vmax=MOST_C, clip=True)}


def _key(figure: Any, panels: list[Axes], theme: Theme) -> None:
    """The colour bar, as a bitmap, beside panels or filling a figure of its own; vectors would be much larger."""
    from matplotlib.cm import ScalarMappable

    place = {"ax": panels, "aspect": 28} if panels else {"cax": figure.add_axes((0.15, 0.05, 0.7, 0.22))}
    scale = ScalarMappable(**_colours(theme))
    bar = figure.colorbar(scale, label=LABEL, orientation="vertical" if panels else "horizontal", **place)
    bar.solids.set_rasterized(True)
    bar.ax.minorticks_off()
    bar.set_ticks([-10, -3, -1, 0, 1, 3, 10], labels=["-10", "-3", "-1", "0", "1", "3", "10"])
    bar.outline.set_visible(False)
    if not panels:
        bar.ax.xaxis.set_ticks_position("top")
        bar.ax.xaxis.set_label_position("top")
