"""The report of a study: one page, and a text for a terminal, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from bandpo.lab import page
from bandpo.lab.report import study_figures as figures
from bandpo.lab.study.analysis import analyse
from bandpo.lab.study.file import parse
from bandpo.lab.study.records import Records

TEXTS = {
    "question": "The question",
    "hypotheses": "What was expected",
    "analysis": "How it is judged",
    "design": "Size",
}
CURVES = {  # key: title, where, share, caption
    "reward": ("Training reward", "curves", False, "Mean over a rollout."),
    "accuracy": ("Held-out accuracy", "evals", False, "By optimiser step."),
    "pass_at_k": ("Held-out pass@k", "evals", False, "At least one of the samples of a problem is right."),
    "entropy": ("Training entropy", "curves", False, "Of the next token, nats."),
    "gradient_kept": ("Gradient kept", "curves", True, "Sum of |c| over sum of |r A|, mean over a rollout's updates."),
    "clipped": ("Tokens without gradient", "curves", True, "Share, mean over a rollout's updates."),
    "kl": ("Divergence reached", "curves", False, "Binary KL of tokens from the old policy, nats."),
}


def write_report(found: Records, out: Path) -> dict[str, Any]:
    """Write the page of a study.

    Args:
        found: its records.
        out: the file.

    Returns:
        Every figure on it, from `analyse`, and "report", the page's path.

    Raises:
        InputError: the page cannot be written, or matplotlib or jinja2 is missing.
    """
    result = analyse(found)
    return {**result, "report": str(page.write(render(found, result), out))}


def render(found: Records, result: Mapping[str, Any]) -> str:
    """Return the page of a study as HTML.

    Args:
        found: its records.
        result: from `analyse`.

    Returns:
        The page.
    """
    study = parse(found.newest, found.name)
    settings = [_setting(study, result, name, s) for name, s in result["settings"].items()]
    return page.render(
        "study.html.j2",
        f"{found.name}: bandpo study",
        name=found.name,
        kicker=_kicker(result),
        texts=[(TEXTS[key], text) for key, text in result["texts"].items()],
        outcomes=list(result["outcomes"].values()),
        amended=result["amendments"],
        words=" ".join(found.words),
        level=_percent(study.level),
        contrasts=[_contrast_row(result, c, len(settings) > 1) for c in result["contrasts"]],
        settings=settings,
        lost=_lost(result),
        recipes=[(name, yaml.safe_dump(keys, sort_keys=False)) for name, keys in found.recipes.items()],
        text=found.text,
        newest=found.newest if found.amendments else "",
        origin=[
            (key, ", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else x)
            for key, x in found.origin.items()
            if x
        ],
    )


def _kicker(result: Mapping[str, Any]) -> str:
    runs = sum(result["runs"].values())
    settings = f"{len(result['settings'])} settings · " if len(result["settings"]) > 1 else ""
    return f"{runs} runs · {settings}{result['seconds'] / 3600:.1f} hours of training"


def _setting(study: Any, result: Mapping[str, Any], name: str, s: Mapping[str, Any]) -> dict[str, Any]:
    looks = figures.look(list(study.arms), s["reference"])
    primary = study.outcomes[0]
    return {
        "name": name, "question": s["question"], "reference": s["reference"], "alone": _alone(s),
        "key": [{"name": arm, "css": looks[arm]["css"], "style": looks[arm]["style"]} for arm in s["arms"]],
        "arms": [_arm_row(result, arm, x, looks[arm]) for arm, x in s["arms"].items()],
        "differences": [
            {"title": x["title"], "rows": [_difference_row(arm, d) for arm, d in s["differences"][o].items()],
             "improvement": o == primary, "margin": study.margin.get(o)}
            for o, x in result["outcomes"].items() if s["differences"][o]
        ],
        "figures": _drawn(_curves(name, s, looks) + _others(name, s, looks, result["outcomes"][primary]["title"])),
        "forests": _drawn(_forests(study, result, name, s, looks)),
        "buckets": _buckets(s),
    }  # fmt: skip


Drawn = tuple[str, str | None, str]  # title, svg, caption


def _drawn(made: Sequence[Drawn]) -> list[dict[str, Any]]:
    return [{"title": title, "svg": Markup(svg), "caption": caption} for title, svg, caption in made if svg]


def _curves(name: str, s: Mapping[str, Any], looks: Mapping[str, Any]) -> list[Drawn]:
    return [
        (title, figures.bands(s[where][key], looks, f"{name}: {title}", _axis(where), share=share), caption)
        for key, (title, where, share, caption) in CURVES.items()
    ]


def _others(name: str, s: Mapping[str, Any], looks: Mapping[str, Any], title: str) -> list[Drawn]:
    pair = figures.against(s["curves"], looks, f"{name}: reward against entropy")
    profile = figures.profile(s["profile"], looks, f"{name}: performance profile", title)
    return [
        ("Reward against entropy", pair, "Means over seeds, smoothed; the dot is the end."),
        (f"{title}: profile", profile, "Share of seeds above a score."),
    ]


def _forests(
    study: Any, result: Mapping[str, Any], name: str, s: Mapping[str, Any], looks: Mapping[str, Any]
) -> list[Drawn]:
    made = []
    for o in study.outcomes:
        svg = figures.forest(s["differences"][o], looks, f"{name}: {o}", study.margin.get(o))
        made.append((f"{result['outcomes'][o]['title']}, minus {s['reference']}", svg, _forest_text(study, o)))
    return made


def _axis(where: str) -> str:
    return "rollout" if where == "curves" else "optimiser step"


def _forest_text(study: Any, outcome: str) -> str:
    margin = study.margin.get(outcome)
    shaded = "" if margin is None else f" Shaded: differences up to {margin:g}, which do not matter."
    return f"Mean over paired seeds, {_percent(study.level)} interval.{shaded}"


def _alone(s: Mapping[str, Any]) -> str:
    """Why there are no intervals, where there are none."""
    most = max((n["n"] for arm in s["arms"].values() for n in arm["outcomes"].values()), default=0)
    if most == 1:
        return "One seed only: a single run says nothing about how much another would differ, so there is no interval."
    return "No run of this setting has ended." if most == 0 else ""


def _arm_row(result: Mapping[str, Any], arm: str, x: Mapping[str, Any], look: Mapping[str, Any]) -> dict[str, Any]:
    cells = [
        {"label": result["outcomes"][o]["title"], "value": number(n["estimate"]), "interval": interval(n)}
        for o, n in x["outcomes"].items()
    ]
    first = next(iter(x["outcomes"].values()))
    cells.insert(1, {"label": "IQM", **_cell(first.get("iqm"))})
    return {"name": arm, "look": look, "n": first["n"], "cells": cells}


def _cell(found: Mapping[str, Any] | None) -> dict[str, str]:
    return (
        {"value": "", "interval": ""}
        if not found
        else {"value": number(found["estimate"]), "interval": interval(found)}
    )


def _difference_row(arm: str, d: Mapping[str, Any]) -> dict[str, Any]:
    boot = {"low": d.get("boot_low"), "high": d.get("boot_high")}
    return {
        "name": arm, "n": d["n"], "mean": number(d["mean"], sign=True), "interval": interval(d, sign=True),
        "boot": interval(boot, sign=True), "p": p_value(d["p"]), "holm": p_value(d["holm"]),
        "improvement": _cell(d.get("improvement")), "equivalent": _equivalent(d.get("equivalence")),
    }  # fmt: skip


def _equivalent(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    if found["p"] is None:
        return "one seed: cannot be told"
    verdict = "yes" if found["equivalent"] else "not shown"
    return f"{verdict}, p {p_value(found['p'])}, ±{found['margin']:g}"


def _contrast_row(result: Mapping[str, Any], c: Mapping[str, Any], several: bool) -> dict[str, Any]:
    where = f", {c['setting']}" if several else ""
    return {
        **_difference_row(f"{c['arm']} − {c['against']}", c),
        "what": f"{result['outcomes'].get(c['outcome'], {}).get('title', c['outcome'])}{where}",
    }


def _buckets(s: Mapping[str, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for arm in s["arms"].values() for name in arm["buckets"]))
    rows = [(arm, [number(x["buckets"].get(name)) for name in names]) for arm, x in s["arms"].items() if x["buckets"]]
    return {"names": [name.removeprefix("p") for name in names], "rows": rows}


def _lost(result: Mapping[str, Any]) -> list[str]:
    """A line for each arm whose runs did not all get to their end."""
    lines = []
    for name, s in result["settings"].items():
        for arm, x in s["arms"].items():
            if x["stopped"] or x["failed"]:
                ended = [f"{x[k]} {k}" for k in ("stopped", "failed") if x[k]]
                lines.append(
                    f"{name}, {arm}: {' and '.join(ended)} of {s['seeds']} runs ({'; '.join(x['errors'])[:300]})"
                )
    return lines


# ---------------------------------------------------------------- numbers as text


def number(value: float | None, *, sign: bool = False) -> str:
    """A number with three digits behind the point, a difference with four; one that is smaller in powers of ten."""
    if value is None:
        return "–"
    form = ("+" if sign else "") + (f".{4 if sign else 3}f" if value == 0 or abs(value) >= 5e-4 else ".1e")
    text = format(value, form)
    return text.replace("-", "−")


def interval(found: Mapping[str, Any], *, sign: bool = False) -> str:
    """An interval, or nothing where there is none."""
    if found.get("low") is None:
        return ""
    return f"[{number(found['low'], sign=sign)}, {number(found['high'], sign=sign)}]"


def p_value(p: float | None) -> str:
    """A p value as people write it."""
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _percent(level: float) -> str:
    return f"{100 * level:g} %"


def as_text(result: Mapping[str, Any]) -> str:
    """Return what a study found as a text for a terminal.

    Args:
        result: from `write_report`.

    Returns:
        The text.
    """
    outcomes: Mapping[str, Any] = result["outcomes"]
    lines = []
    for name, s in result["settings"].items():
        head = ["arm", "seeds", *(x["title"] for x in outcomes.values())]
        rows = [[arm, *_row_text(x)] for arm, x in s["arms"].items()]
        lines += [f"{name}, mean and {_percent(result['level'])} interval over seeds", *_table([head, *rows]), ""]
        lines += [why, ""] if (why := _alone(s)) else []
    for c in result["contrasts"]:
        row = _contrast_row(result, c, len(result["settings"]) > 1)
        told = f"{row['mean']} {row['interval']}, p {row['p']}, Holm {row['holm']}"
        lines.append(
            f"{row['name']} ({row['what']}): {told}"
            + (f", equivalent: {row['equivalent']}" if row["equivalent"] else "")
        )
    return page.visible("\n".join([*lines, *_lost(result), f"report: {result['report']}"]))


def _row_text(x: Mapping[str, Any]) -> list[str]:
    numbers = list(x["outcomes"].values())
    return [str(numbers[0]["n"]), *(f"{number(n['estimate'])} {interval(n)}".strip() for n in numbers)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
