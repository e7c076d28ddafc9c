"""The page of a bandit: question, settings, arms, curves, and the exact drift beside its simulation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo.lab import page
from bandpo.lab.bandit_table import agrees, arms_table, buckets_table, contrasts_table, drift_rows, summed
from bandpo.lab.page.svg import inline
from bandpo.plots import COLOURS, DASHED, MUTED, RC, RULE, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {"found": "Seeds that have found it", "entropy": "Entropy"}
SERIES = (0, 1, 2, 3, 5)  # of `COLOURS`; the fourth is too near the reference's grey
LONGEST = 5  # arms in a panel that have no group
FACTS = {
    "reward": "reward", "actions": "actions", "positions": "states in a chain", "start": "start of the rest",
    "good": "good actions", "good_p": "start of each", "decent_p": "start of the decent one",
    "decent_reward": "reward of it", "seeds": "seeds an arm", "first_seed": "first seed",
    "samples": "samples a rollout", "group": "standardised in groups of", "rollouts": "rollouts",
    "updates": "updates a rollout", "minibatches": "minibatches", "staleness": "staleness in rollouts",
    "optimizer": "optimiser", "lr": "learning rate", "betas": "its betas", "dtype": "arithmetic",
}  # fmt: skip


def write_page(result: Mapping[str, Any], command: str, path: Path) -> Path:
    """Write the page.

    Args:
        result: what `run_study` returned.
        command: that made it.
        path: the file.

    Returns:
        The path.

    Raises:
        InputError: matplotlib or jinja2 is missing, or the file cannot be written.
    """
    need_matplotlib()
    settings = [_setting(name, setting) for name, setting in result["settings"].items()]
    texts = {name: result.get(name, "") for name in ("question", "outcomes", "analysis")}
    title = "bandpo bandit: what a clip does, in a state that is known exactly"
    return page.write(page.render("bandit.html.j2", title, command=command, settings=settings, **texts), path)


def _setting(name: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(setting["arms"].values()))
    panels = [
        {"title": f"{title}{', ' + group if group else ''}", "svg": svg, "key": key, "kind": kind}
        for group, arms in _groups(setting).items()
        for kind, title in CURVES.items()
        if kind in first["curves"]
        for svg, key in [_panel(setting, arms, kind, f"{name}: {title}, {group}")]
    ]
    drift = drift_rows(setting["drift"])
    return {
        "name": name,
        **setting,
        "shown": [(FACTS[key], _fact(value)) for key, value in setting["facts"].items() if value is not None],
        "start": {"entropy": f"{first['entropy_start']:.3f}", "tail": f"{first['tail_start']:.3f}"},
        "table": arms_table(setting),
        "contrasts": contrasts_table(setting),
        "clips": [(arm, _spec(x)) for arm, x in setting["arms"].items()],
        "panels": panels,
        "buckets": buckets_table(setting),
        "drift": drift,
        "held": sum(agrees(row) for row in setting["drift"]),
        "of": len(summed(setting["drift"])),
        "drawn": [_drift_figure(drift, kind, f"{name}: {kind}") for kind in ("exact", "own")] if drift else [],
    }


def _fact(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{x:g}" for x in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _spec(arm: Mapping[str, Any]) -> str:
    """Return a clip as a call: name(argument=value)."""
    return f"{arm['clip']}({', '.join(f'{key}={value!r}' for key, value in arm['clip_args'].items())})"


def _groups(setting: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the arms of each panel by its title: those of a group, or a few that follow each other."""
    rest = [name for name in setting["arms"] if name != setting["reference"]]
    found: dict[str, list[str]] = {}
    loose = [name for name in rest if not setting["arms"][name]["group"]]
    for name in rest:
        if group := setting["arms"][name]["group"]:
            found.setdefault(group, []).append(name)
    for i in range(0, len(loose), LONGEST):
        found["" if len(loose) <= LONGEST else f"{loose[i]} to {loose[i : i + LONGEST][-1]}"] = loose[i : i + LONGEST]
    return found or {"": []}


def _panel(setting: Mapping[str, Any], arms: list[str], kind: str, label: str) -> tuple[str, list[dict[str, str]]]:
    """Draw a curve of some arms over that of the reference; return it and its key."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    key = []
    with rc_context(RC):
        figure, axes = _figure(5.0, 2.9)
        for i, name in enumerate([setting["reference"], *arms]):
            colour = MUTED if i == 0 else COLOURS[SERIES[(i - 1) % len(SERIES)]]
            dashed = i == 0 or i > len(SERIES)
            curve = setting["arms"][name]["curves"][kind]
            rollouts = range(len(curve["value"]))
            width = max(1.2, 2.8 - 0.4 * i)  # so that of equal curves the lower ones are seen
            axes.plot(rollouts, curve["value"], color=colour, linewidth=width, linestyle=DASHED if dashed else "-")
            if None not in curve["low"]:
                axes.fill_between(rollouts, curve["low"], curve["high"], color=colour, alpha=0.14, linewidth=0)
            key.append({"name": name, "colour": _variable(colour), "style": "dashed" if dashed else "solid"})
        axes.set_xlim(left=0)
        axes.set_xlabel("rollouts")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kind == "found":
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.set_ylabel("nats")
        return inline(figure, label), key


def _drift_figure(rows: list[dict[str, Any]], kind: str, label: str) -> str:
    """Draw the drift of each row: the sum as a dot, and the simulation's interval or that over seeds as a line."""
    from matplotlib import rc_context

    rows = [row for row in rows if row[kind] is not None]
    with rc_context(RC):
        figure, axes = _figure(5.0, 0.9 + 0.2 * len(rows))
        around = "simulated" if kind == "exact" else "own"
        for i, row in enumerate(rows):
            colour = COLOURS[1] if row["arm"] else COLOURS[0]
            if row[f"{around}_low"] is not None:
                axes.plot([row[f"{around}_low"], row[f"{around}_high"]], [i, i], color=colour, linewidth=4, alpha=0.35)
            axes.plot([row[kind]], [i], "o", color=colour, markersize=4)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        names = [row["names"][0] + (f" +{len(row['names']) - 1}" if len(row["names"]) > 1 else "") for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_xlabel("nats by unit of total variation moved")
        return inline(figure, label)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _variable(colour: str) -> str:
    """Return the page's name of a colour."""
    return "var(--muted)" if colour == MUTED else f"var(--c{COLOURS.index(colour)})"
