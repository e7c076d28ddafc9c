"""The page of `bandpo explain --html`: the explanation's numbers, and two pictures of the tokens."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bandpo.analysis.explanation import Explanation
from bandpo.analysis.text import EQUAL, WHY, many, measured, number, percent, taken, why_none
from bandpo.clips.base import Clip, Region
from bandpo.lab.page import render, write
from bandpo.lab.page.svg import inline
from bandpo.plots import COLOURS, DASHED, MUTED, RC, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Dots are one embedded bitmap, so their colours must do on both themes.
DOTS = {"kept": "#8791a0", "positive": "#0d9f88", "negative": "#d8447f"}
RIGHT = 2e-4  # how near to 1 the axis of p goes


def write_page(found: Explanation, name: str, path: Path, command: Sequence[str]) -> Path:
    """Write one page that needs neither network nor any other file.

    Args:
        found: what `bandpo.explain` returned.
        name: of the log, for the page's head.
        path: the file; one that is there is replaced.
        command: the words that made the page, after ``bandpo``.

    Returns:
        The path.

    Raises:
        InputError: jinja2 or matplotlib is missing, or the file cannot be written.
    """
    need_matplotlib()
    d = found.to_dict()
    if where := measured(d["clip"]):
        d["remarks"].append(f"other clips, divergences and equal radii are{where.removeprefix(',')}")
    page = render(
        "explain.html.j2",
        f"{d['clip']['name']} on {name}: bandpo explain",
        d=d,
        name=name,
        command=shlex.join(["bandpo", *command]),
        why=WHY.get(d["idle"]["why"], "no.").split(":")[0].rstrip("."),
        because=WHY.get(d["idle"]["why"], "").partition(": ")[2],
        equal=_equal(d["equivalent"]),
        buckets=list(dict.fromkeys(row["bucket"] for row in d["effect"])),
        cells={f"{row['bucket']} {row['sign']}": row for row in d["effect"]},
        kept=_kept(d),
        region=_region(found),
        missing=[row for row in d["clips"] if row["missing"]],
        known=_known(d["clips"]),
        gap_rows=[(_bucket(x["bucket"]), x) for x in (d["rollout"] or {"by_bucket": []})["by_bucket"]],
        percent=percent,
        number=number,
        many=many,
        bucket=_bucket,
    )
    return write(page, path)


def _bucket(name: str) -> str:
    return name.removeprefix("p").replace("-", " to ")


def _equal(same: dict[str, Any]) -> dict[str, Any]:
    """What is as wide as the clip, in words and as rows."""
    rows = [(name, number(same[key]["value"])) for name, key in EQUAL if same[key]]
    if not rows:
        title = f"{why_none(same)}.".capitalize()
    elif same["by"] is None:
        title = "It took nothing, and so does anything of at least:"
    else:
        title = f"{taken(same)} with:".capitalize()
    return {"title": title, "rows": rows}


def _known(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each thing that clips would do; those that cannot be told apart share it."""
    keys = ("zero_grad", "zero_grad_rare", "gradient_kept", "gradient_opposed")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in clips:
        if not row["missing"]:
            same = rows.setdefault((*(percent(row[key]) for key in keys), number(row["entropy"])), {**row, "names": []})
            same["names"].append(row["clip"])
    return list(rows.values())


def _kept(d: dict[str, Any]) -> str:
    """The gradient kept by old probability, for both signs of A."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = {sign: [r for r in d["effect"] if r["sign"] == sign and r["bucket"] != "all"] for sign in _SIGNS}
    with rc_context(RC):
        figure = Figure(figsize=(5.0, 3.7), layout="constrained")
        axes = figure.subplots()
        for i, (sign, colour) in enumerate(_SIGNS.items()):
            kept = [math.nan if row["gradient_kept"] is None else row["gradient_kept"] for row in rows[sign]]
            axes.bar(np.arange(len(kept)) + 0.4 * i - 0.2, kept, 0.37, color=colour)
        shares = [percent(row["share"]) for row in d["effect"] if row["sign"] == "all" and row["bucket"] != "all"]
        names = [_bucket(row["bucket"]).replace(" to ", "–") for row in rows["positive"]]
        axes.set_xticks(range(len(names)), [f"{a}\n{b}" for a, b in zip(names, shares, strict=True)])
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=DASHED)
        axes.yaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
        axes.set(xlabel="old probability p, and its share of the tokens", ylim=(0, None))
        axes.grid(axis="x", visible=False)
        return inline(figure, "Gradient kept by old probability")


_SIGNS = {"positive": COLOURS[2], "negative": COLOURS[1]}


def _region(found: Explanation) -> dict[str, Any]:
    """The tokens, by old probability and ratio, and the clip's region where it has one."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    p, r, kinds = _kinds(found)
    left = 10.0 ** min(-2, max(-6, math.floor(math.log10(max(float(np.quantile(p, 0.001)), 1e-12)))))
    reach = 1.15 * math.exp(min(max(float(np.quantile(np.abs(np.log(r)), 0.99)), 0.4), 3.0))
    region = _drawable(found.chosen)
    with rc_context(RC):
        figure = Figure(figsize=(5.0, 3.7), layout="constrained")
        axes = figure.subplots()
        if region is not None:
            _boundary(axes, region, left, reach)
        for kind, colour in DOTS.items():
            x, y = p[kinds == kind].clip(left, 1 - RIGHT), r[kinds == kind].clip(1 / reach, reach)
            size, alpha = (3, 0.35) if kind == "kept" else (6, 0.8)
            axes.scatter(x, y, s=size, color=colour, alpha=alpha, linewidths=0, rasterized=True)
        _scales(axes, left, reach)
        label = re.sub("[^a-z0-9. ]", " ", found.clip["name"].lower())
        svg = inline(figure, f"Tokens by old probability and ratio, under {label}")
    counts = {kind: int((kinds == kind).sum()) for kind in DOTS}
    return {"svg": svg, "has_region": region is not None, "counts": counts, "colours": DOTS, "shown": len(p)}


def _kinds(found: Explanation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old probability, ratio and fate of each token of the sample."""
    log_p, log_r, advantages, zero = (
        found.sample[k].double().numpy() for k in ("log_p", "log_r", "advantages", "zero")
    )
    shut = (zero > 0) & (advantages != 0)
    kinds = np.where(~shut, "kept", np.where(advantages > 0, "positive", "negative"))
    return np.exp(log_p), np.exp(log_r.clip(-20, 20)), kinds


def _drawable(clip: Clip) -> Region | None:
    region = clip.boundary
    return region if region is not None and region.as_bounds and clip.name != "none" else None


def _boundary(axes: Axes, region: Region, left: float, reach: float) -> None:
    """The region, and the limit of the simplex."""
    odds = np.linspace(math.log(left), -math.log(RIGHT), 400)
    p = 1 / (1 + np.exp(-odds))
    bounds = region.bounds(torch.from_numpy(np.log(p)))
    low, high = bounds.low.clamp(min=0.5 / reach).numpy(), bounds.high.clamp(max=2 * reach).numpy()
    axes.fill_between(p, low, high, color=COLOURS[0], alpha=0.10, linewidth=0)
    for edge in (low, high):
        axes.plot(p, edge, color=COLOURS[0], linewidth=1.4)
    axes.plot(p, 1 / p, color=MUTED, linewidth=1, linestyle=DASHED)


def _scales(axes: Axes, left: float, reach: float) -> None:
    """Set p from `left` to nearly 1, both ends opened up, and r from 1/reach to reach; ticks are plain numbers."""
    from matplotlib.ticker import NullFormatter

    axes.set(xlim=(left, 1 - RIGHT), ylim=(1 / reach, reach), xscale="logit", yscale="log")
    ticks = [t for t in (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999) if t >= left]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    fine, wide = (0.25, 0.5, 0.8, 1, 1.25, 2, 4), (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 10, 20)
    marks = [t for t in (fine if reach < 6 else wide) if 1 / reach <= t <= reach]
    axes.set_yticks(marks, [f"{t:g}" for t in marks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="old probability p", ylabel="ratio r")
