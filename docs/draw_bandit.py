"""Draws the pictures of docs/bandit.md out of its table: ``python docs/draw_bandit.py [FOLDER]``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from bandpo.plots import save
from bandpo.plots.look import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE = Path(__file__).parent / "data" / "bandit-entropy.csv"
PANELS = {"exact": "fresh samples: each is used once", "own": "own samples: used for 16 updates"}
PICTURES = {"bandit-entropy": LIGHT, "bandit-entropy-dark": DARK}
SETTING = "noise"
IDLE = 5e-5  # a drift that rounds to nothing


def rows() -> list[tuple[list[str], dict[str, str]]]:
    """Return the clips of the setting, those of equal drift as one, by the drift of their own samples."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["setting"] == SETTING]
    found: dict[object, tuple[list[str], dict[str, str]]] = {}
    for row in sorted(table, key=lambda row: -float(row["own"])):
        idle = max(abs(float(row[kind] or 1)) for kind in PANELS) < IDLE
        key = "idle" if idle else (row["exact"] or row["name"], row["own"])
        found.setdefault(key, ([], row))[0].append(row["name"])
    return list(found.values())


def label(names: list[str]) -> str:
    """Return what stands at the axis for clips of equal drift."""
    return ", ".join(names) if len(names) <= 4 else f"does not act here: {len(names)} clips"


def draw(theme: Theme) -> Figure:
    """Return two panels, a line for each clip."""
    found = rows()
    with rc_context(theme.rc):
        figure = Figure(figsize=(10, 0.9 + 0.21 * len(found)), layout="constrained")
        for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
            _panel(axes, kind, [row for _, row in found], theme)
            axes.set(title=title, ylim=(len(found) - 0.5, -0.5), xlabel="nats by unit of total variation")
            axes.set_yticks(range(len(found)), [label(names) for names, _ in found], fontsize=8.5)
    return figure


def _panel(axes: Axes, kind: str, shown: list[dict[str, str]], theme: Theme) -> None:
    """A dot for each sum, a bar for its interval over seeds."""
    for i, row in enumerate(shown):
        if row[kind]:
            low, high = float(row[f"{kind}_low"]), float(row[f"{kind}_high"])
            colour = theme.muted if low <= 0 <= high else theme.colours[0 if low > 0 else 1]
            axes.plot([low, high], [i, i], color=colour, linewidth=4, alpha=0.35)
            axes.plot([float(row[kind])], [i], "o", color=colour, markersize=4)
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    axes.grid(linewidth=0.5)


def main(folder: Path) -> None:
    """Write the pictures."""
    for name, theme in PICTURES.items():
        print(save(draw(theme), folder / f"{name}.svg", theme))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/img"))
