"""Draws the pictures of the docs and writes what of them is generated: ``python docs/draw.py``.

With a FOLDER it draws the pictures of operator.md alone, into that folder.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import bandpo
from bandpo import plots
from bandpo.lab.cards.write import write_pictures, write_texts
from bandpo.operator.family import FAMILY
from bandpo.operator.solver import fall, tail_bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(FAMILY, (*plots.COLOURS, "#9a8534"), strict=True))
MATCHED = 0.1  # the old probability at which all upper bounds of the first two pictures agree
STYLES = {"js": plots.DASHED}  # it all but covers hellinger
ORDERS = {-1: "-1\nneyman", 0: "0\nkl", 0.5: "0.5\n\nhellinger", 1: "1\nreverse_kl", 2: "2\nchi2", 3: "3"}
SOLVED = ("kl", "chi2", "reverse_kl", "js", "alpha:0.3", "alpha:-1.5", "alpha:3")
ENOUGH = 20  # evaluations after which nothing changes but rounding


def matched_radii() -> dict[str, float]:
    """Return, for each of the family, the radius with the upper bound of kl 0.05 at p = `MATCHED`."""
    log_p = torch.tensor([MATCHED], dtype=torch.float64).log()
    bounds = bandpo.band(log_p, 0.05)
    return {name: bandpo.implied_delta(bounds.log_low, bounds.log_high, log_p, name)[1].item() for name in FAMILY}


def errors(name: str, most: int = 8) -> list[float]:
    """Return the solver's worst relative error of a log bound after 1 to `most` evaluations of g_f.

    Over log p from -80 to -1e-7 and delta from 1e-6 to 20, against `ENOUGH` evaluations, in float64; lower bounds below
    e^-60 are left out.
    """
    log_p = -torch.logspace(-7, 1.903, 46, dtype=torch.float64).expand(24, 46).contiguous()
    delta = torch.logspace(-6, 1.301, 24, dtype=torch.float64)[:, None].expand(24, 46).contiguous()
    divergence = bandpo.get_divergence(name)

    def after(steps: int) -> Tensor:
        low, high = tail_bounds(functools.partial(fall, divergence, steps), divergence.shape, log_p, delta, delta)
        return torch.stack([low.clamp(max=0.0), torch.minimum(high.clamp(min=0.0), -log_p)])

    exact = after(ENOUGH)
    seen = exact > -60
    return [float(((after(n) - exact) / exact)[seen].abs().max()) for n in range(1, most + 1)]


def draw_bounds(axes: Axes) -> None:
    """Ratio bounds of the family against p."""
    p = torch.logspace(-3, 0, 101, dtype=torch.float64)[:-1]
    for name, delta in matched_radii().items():
        bounds = bandpo.band(p.log(), delta, name)
        style = STYLES.get(name, "-")
        axes.plot(p, bounds.high, color=COLOURS[name], linestyle=style, label=f"{name} {delta:.3g}")
        axes.plot(p, bounds.low.clamp(min=1e-9), color=COLOURS[name], linestyle=style)
    axes.plot(p, 1 / p, color=plots.INK, linewidth=1, linestyle=plots.DASHED)
    axes.text(0.0122, 92, "limit: r = 1/p", fontsize=9, color=plots.MUTED)
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(0.03, 200), title="How far the ratio may go")
    axes.set(xlabel="old probability p", ylabel="ratio r = q / p")
    axes.set_xticks([1e-3, 1e-2, 1e-1, 1], ["0.001", "0.01", "0.1", "1"])
    axes.set_yticks([0.05, 0.2, 1, 5, 20, 100], ["0.05", "0.2", "1", "5", "20", "100"])
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=4, fontsize=9, columnspacing=1.2)


def draw_reach(axes: Axes) -> None:
    """How far the probability itself may move, against p."""
    p = torch.linspace(0, 1, 121, dtype=torch.float64)[1:-1]
    for name, delta in matched_radii().items():
        bounds = bandpo.band(p.log(), delta, name)
        style = STYLES.get(name, "-")
        axes.plot(p, p * bounds.high - p, color=COLOURS[name], linestyle=style, label=f"{name} {delta:.3g}")
        axes.plot(p, p * bounds.low - p, color=COLOURS[name], linestyle=style)
    for end in ([0, -1], [1, 0]):
        axes.plot([0, 1], end, color=plots.INK, linewidth=1, linestyle=plots.DASHED)
    axes.axhline(0, color=plots.MUTED, linewidth=0.8)
    axes.text(0.8, 0.235, "limit: q = 1", fontsize=9, color=plots.MUTED)
    axes.text(0.025, -0.235, "limit: q = 0", fontsize=9, color=plots.MUTED)
    axes.set(xlim=(0, 1), ylim=(-0.25, 0.25), title="How far the probability may move")
    axes.set(xlabel="old probability p", ylabel="change q - p")
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    axes.set_yticks([-0.2, -0.1, 0, 0.1, 0.2], ["-0.2", "-0.1", "0", "+0.1", "+0.2"])
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=4, fontsize=9, columnspacing=1.2)


def draw_axis(axes: Axes) -> None:
    """Bounds of alpha:A against A, for some p."""
    orders = torch.linspace(-1.5, 3, 91, dtype=torch.float64).tolist()
    p = torch.tensor([0.001, 0.01, 0.1, 0.5], dtype=torch.float64)
    bounds = [bandpo.band(p.log(), 0.05, f"alpha:{order:.6g}") for order in orders]
    low, high = (torch.stack([getattr(b, side) for b in bounds]) for side in ("low", "high"))
    for i, share in enumerate(p.tolist()):
        axes.plot(orders, high[:, i], color=plots.COLOURS[i], label=f"p = {share:g}")
        axes.plot(orders, low[:, i].clamp(min=1e-9), color=plots.COLOURS[i])
    axes.axhline(1, color=plots.MUTED, linewidth=0.8)
    axes.set(yscale="log", xlim=(-1.5, 3), ylim=(0.03, 200), title="The family on one axis, delta = 0.05")
    axes.set(xlabel="order A of alpha:A", ylabel="ratio r = q / p")
    axes.set_xticks(list(ORDERS), list(ORDERS.values()))
    axes.set_yticks([0.05, 0.2, 1, 5, 20, 100], ["0.05", "0.2", "1", "5", "20", "100"])
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.27), ncols=4, fontsize=9, columnspacing=1.2)


def draw_errors(axes: Axes) -> None:
    """The solver's error against evaluations of g_f."""
    floor = 1e-10
    for i, name in enumerate(SOLVED):
        colour = list(COLOURS.values())[i]
        worst = [max(error, floor) for error in errors(name)]
        axes.plot(range(1, len(worst) + 1), worst, "o-", color=colour, markersize=4, label=name)
    for steps, what in ((4, "float32"), (6, "float64")):
        axes.axvline(steps, color=plots.INK, linewidth=1, linestyle=plots.DASHED)
        axes.text(steps + 0.08, 1.1, what, fontsize=9, color=plots.MUTED)
    axes.set(yscale="log", xlim=(0.8, 8.2), ylim=(floor / 2, 4), title="Worst error of the solver")
    axes.set(xlabel="evaluations of g_f", ylabel="relative error of log r")
    axes.set_yticks([1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10], ["1", "1e-2", "1e-4", "1e-6", "1e-8", "≤ 1e-10"])
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=4, fontsize=9, columnspacing=1.2)


PICTURES = {"family": draw_bounds, "reach": draw_reach, "axis": draw_axis, "solver": draw_errors}


def figure(name: str) -> Figure:
    """Return the picture of that name in `PICTURES`."""
    plots.need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plots.RC):
        drawn = Figure(figsize=(5.6, 4.2), layout="constrained", facecolor="white")
        drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        PICTURES[name](drawn.subplots())
    return drawn


def main(folder: Path) -> None:
    """Draw all pictures to a folder and print the radii of the first two."""
    for name in PICTURES:
        print(*plots.save_both(figure(name), folder / f"{name}.svg"), sep="\n")
    print("radii:", ", ".join(f"{name} {delta:.4f}" for name, delta in matched_radii().items()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        docs = Path(__file__).parent
        main(docs / "img")
        print(len(write_texts(docs)), "cards and tables,", len(write_pictures(docs)), "pictures of clips")
