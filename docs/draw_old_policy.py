"""Draws the picture of docs/old-policy.md: ``python docs/draw_old_policy.py [FILE.svg]``."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from bandpo.clips import ANCHORS
from bandpo.plots import COLOURS, DASHED, INK, MUTED, RC, save_both

PLACES = {"rollout": (0.0, 0.0), "old": (0.0, 1.0), "new": (1.0, 0.5)}
LABELS = {"rollout": "rollout engine", "old": "trainer, old", "new": "trainer,\nnow"}
# anchor: from where the trust region is measured, and what the weight divides by
FROM = {"old": ("old", "old"), "p": ("rollout", "old"), "r": ("old", "rollout"), "both": ("rollout", "rollout")}


def draw() -> Figure:
    """Return four panels, one for each anchor."""
    with rc_context(RC | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained", facecolor="white")
        for axes, anchor in zip(figure.subplots(2, 2).flat, ANCHORS, strict=True):
            region, weight = FROM[anchor]
            _arrow(axes, region, COLOURS[0], "-", 0.14)
            _arrow(axes, weight, COLOURS[1], DASHED, -0.14)
            for name, (x, y) in PLACES.items():
                axes.plot(x, y, "o", color=INK, markersize=8, zorder=3)
                if name == "new":
                    axes.text(x + 0.12, y, LABELS[name], ha="left", va="center")
                else:
                    up = 1 if name == "old" else -1
                    axes.text(x, y + 0.13 * up, LABELS[name], ha="center", va="bottom" if up > 0 else "top")
            axes.set(xlim=(-0.5, 1.6), ylim=(-0.4, 1.4), xticks=[], yticks=[], title=f'anchor="{anchor}"')
        axes.plot([], [], color=COLOURS[0], label="the trust region: p, and r = new / p")
        axes.plot([], [], color=COLOURS[1], linestyle=DASHED, label="the weight that multiplies A")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, labelcolor=MUTED)
    return figure


def _arrow(axes: object, start: str, colour: str, style: object, bend: float) -> None:
    arrow = FancyArrowPatch(
        PLACES[start], PLACES["new"], connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=14,
        color=colour, linestyle=style, linewidth=1.8, shrinkA=8, shrinkB=8,
    )  # fmt: skip
    axes.add_patch(arrow)  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(*save_both(draw(), Path(sys.argv[1] if len(sys.argv) > 1 else "docs/img/old-policy.svg")), sep="\n")
