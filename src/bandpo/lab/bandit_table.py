"""The arms of a bandit as a table, in text and for the page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bandpo.loss.stats import BUCKETS

ABSENT = "–"
LEFT_OUT = ("KL of a rollout", "entropy at the end", "TV of a rollout")  # of the terminal; the page and JSON have all
WITH_INTERVAL = ("found", "median", "entropy,")
BEYOND = "beyond"  # the last rollout: fewer than half the seeds got there


class Cell(NamedTuple):
    """A number as text, and its 95 % interval, or ""."""

    value: str
    interval: str = ""


class Table(NamedTuple):
    """Heads of the columns, and rows that begin with a name."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def cell(x: Mapping[str, Any] | None, form: str = ".3f") -> Cell:
    """Return a mean with its interval as text.

    Args:
        x: {"value", "low", "high"}, None where there is none.
        form: format of the numbers.

    Returns:
        `Cell`.
    """
    if x is None or x["value"] is None:
        return Cell(ABSENT)
    if x["low"] is None or x["high"] is None:
        return Cell(f"{x['value']:{form}}")
    return Cell(f"{x['value']:{form}}", f"{x['low']:{form}} to {x['high']:{form}}")


def arms_table(setting: Mapping[str, Any]) -> Table:
    """Return the outcomes of a setting's arms.

    Args:
        setting: one of those that `run_study` returns.

    Returns:
        `Table`.
    """
    columns = _columns(setting["reference"], noise=setting["facts"]["reward"] == "noise")
    rows = [(name, [make(arm) for make in columns.values()]) for name, arm in setting["arms"].items()]
    return Table(list(columns), rows)


def _columns(reference: str, *, noise: bool) -> dict[str, Callable[[Mapping[str, Any]], Cell]]:
    found: dict[str, Callable[[Mapping[str, Any]], Cell]] = {}
    if not noise:
        found |= {
            "found": _found,
            f"found, minus {reference}": lambda arm: cell(arm["less_reference"].get("found"), "+.3f"),
            "median rollouts": _median,
        }
    found["entropy at the end"] = lambda arm: cell(arm["entropy_end"])
    if noise:
        found[f"entropy, minus {reference}"] = lambda arm: cell(arm["less_reference"].get("entropy_end"), "+.3f")
    found["tail at the end"] = lambda arm: cell(arm["tail_end"])
    if noise:
        found |= {
            "entropy by unit of TV": lambda arm: cell(arm["entropy_per_tv"], "+.3f"),
            "TV of a rollout": lambda arm: cell(arm["tv"]),
            "KL of a rollout": lambda arm: cell(arm["kl"]),
        }
    return found | {
        "KL, first five": lambda arm: cell(arm["kl_first"]),
        "zero gradient": lambda arm: cell(arm["zero_gradient"]),
        "gradient kept": lambda arm: cell(arm["gradient_kept"]),
    }


def _found(arm: Mapping[str, Any]) -> Cell:
    x = arm["found"]
    return Cell(f"{x['value']:.3f} ({x['count']}/{x['seeds']})", cell(x).interval)


def _median(arm: Mapping[str, Any]) -> Cell:
    x = arm["median"]
    value, low, high = (BEYOND if x[key] is None else f"{x[key]:g}" for key in ("value", "low", "high"))
    return Cell(value, "" if low == high == BEYOND else f"{low} to {high}")


def contrasts_table(setting: Mapping[str, Any]) -> Table | None:
    """Return the contrasts that the study is about, or None where it names none."""
    names = {
        "found": "found",
        "entropy_end": "entropy at the end",
        "tail_end": "tail",
        "gradient_kept": "gradient kept",
    }
    rows = setting["contrasts"]
    if not rows:
        return None
    shown = {key: name for key, name in names.items() if key in rows[0]}
    cells = [(f"{row['arm']} − {row['against']}", [cell(row[key], "+.3f") for key in shown]) for row in rows]
    return Table(list(shown.values()), cells)


def buckets_table(setting: Mapping[str, Any]) -> Table:
    """Return what is kept of the gradient by bucket of old probability, with the bucket's share of the tokens."""
    rows = []
    for name, arm in setting["arms"].items():
        cells = []
        for bucket in BUCKETS:
            x = arm["buckets"][bucket]
            kept = ABSENT if x["gradient_kept"] is None else f"{x['gradient_kept']:.3f}"
            cells.append(Cell(kept, f"{x['share']:.1%} of tokens"))
        rows.append((name, cells))
    return Table([bucket[1:].replace("-", "–") for bucket in BUCKETS], rows)


def drift_rows(drift: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a drift table, those of equal numbers as one, with ``names`` and cells of each kind."""
    found: dict[object, dict[str, Any]] = {}
    for row in drift:
        key = row["name"] if row["exact"] is None else (round(row["exact"], 9), round(row["own"], 9))
        if key in found:
            found[key]["names"].append(row["name"])
            found[key]["arm"] = found[key]["arm"] or row["arm"]
            continue
        cells = {
            kind: cell({x: row[f"{kind}{y}"] for x, y in (("value", ""), ("low", "_low"), ("high", "_high"))}, "+.4f")
            for kind in ("exact", "simulated", "own")
        }
        found[key] = {**row, "names": [row["name"]], "cells": cells, "agrees": agrees(row)}
    return list(found.values())


def summed(drift: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that have a sum for fresh samples: those of clips that do not look at the batch."""
    return [row for row in drift if row["exact"] is not None]


def agrees(row: Mapping[str, Any]) -> bool:
    """Return whether the simulated interval holds the exact sum."""
    return row["simulated_low"] is not None and row["simulated_low"] <= row["exact"] <= row["simulated_high"]


def as_text(result: Mapping[str, Any]) -> str:
    """Return all tables for a terminal."""
    lines: list[str] = []
    for name, setting in result["settings"].items():
        facts, arm = setting["facts"], next(iter(setting["arms"].values()))
        lines += [
            f"{name}: {facts['actions']:,} actions, {facts['positions']} in a chain, {facts['seeds']} seeds, "
            f"{facts['rollouts']} rollouts of {facts['samples']} samples and {facts['updates']} updates, "
            f"{facts['optimizer']} {facts['lr']:g}, staleness {facts['staleness']}",
            f"at the start: entropy {arm['entropy_start']:.3f}, tail {arm['tail_start']:.3f}; "
            "below: means, with 95 % intervals over seeds",
            *_lines(_brief(arms_table(setting))),
        ]
        contrasts = contrasts_table(setting)
        lines += ["", "contrasts, with intervals for all of them together", *_lines(contrasts)] if contrasts else []
        lines += _drift_lines(setting["drift"]) if setting["drift"] else []
        lines.append("")
    return "\n".join(lines[:-1])


def drift_csv(result: Mapping[str, Any]) -> str:
    """Return the drift tables of all settings as CSV, a row a clip; what a clip has not is left empty.

    Args:
        result: what `run_study` returned.
    """
    numbers = [f"{kind}{end}" for kind in ("exact", "simulated", "own") for end in ("", "_low", "_high")]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["setting", "name", "clip", "clip_args", *numbers])
    for name, setting in result["settings"].items():
        for row in setting["drift"]:
            args = json.dumps(row["clip_args"]) if row["clip_args"] else ""
            shown = ["" if row[key] is None else f"{row[key]:.6g}" for key in numbers]
            out.writerow([name, row["name"], row["clip"], args, *shown])
    return text.getvalue()


def _brief(table: Table) -> Table:
    """Return what a terminal has room for: the first columns with their intervals, of the others the numbers."""
    kept = [i for i, head in enumerate(table.heads) if head not in LEFT_OUT and not head.startswith("found,")]
    whole = [table.heads[i].startswith(WITH_INTERVAL) for i in kept]
    rows = [
        (name, [cells[i] if all_ else Cell(cells[i].value) for i, all_ in zip(kept, whole, strict=True)])
        for name, cells in table.rows
    ]
    return Table([table.heads[i] for i in kept], rows)


def _drift_lines(drift: list[dict[str, Any]]) -> list[str]:
    rows = drift_rows(drift)
    table = Table(
        ["exact sum", "simulated", "own samples"],
        [(", ".join(r["names"]), [r["cells"][kind] for kind in ("exact", "simulated", "own")]) for r in rows],
    )
    rows_with_sum = summed(drift)
    held = sum(agrees(row) for row in rows_with_sum)
    return [
        "",
        "entropy drift by unit of TV moved: of fresh samples (the sum; a simulation), of its own samples minus 'none'",
        *_lines(table, widest=44),
        f"the simulated intervals, together at 95 %, hold the sum in {held} of {len(rows_with_sum)} clips",
    ]


def _lines(table: Table, widest: int = 30) -> list[str]:
    """Lay a table out: the name, then each column as wide as it must be, intervals behind their numbers."""
    texts = [[f"{c.value} [{c.interval}]" if c.interval else c.value for c in cells] for _, cells in table.rows]
    columns = zip(table.heads, *texts, strict=True)
    widths = [max(len(x) for x in column) for column in columns]
    first = min(widest, max(len(name) for name, _ in table.rows))
    head = " " * first + "  " + "  ".join(f"{h:>{w}}" for h, w in zip(table.heads, widths, strict=True))
    lines = [head]
    for (name, _), cells in zip(table.rows, texts, strict=True):
        shown = name if len(name) <= first else name[: first - 1] + "…"
        lines.append(f"{shown:<{first}}  " + "  ".join(f"{x:>{w}}" for x, w in zip(cells, widths, strict=True)))
    return lines
