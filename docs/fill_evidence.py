"""Writes the tables of docs/evidence.md and draws its pictures out of the records: ``python docs/fill_evidence.py``."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bandpo.lab.stats import paired
from bandpo.lab.study import records
from bandpo.lab.study.analysis import analyse, values_of
from bandpo.lab.study.file import parse
from bandpo.plots import save
from bandpo.plots.look import DARK, LIGHT, Theme

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "studies" / "results"
PAGE = DOCS / "evidence.md"
MEASURED = DOCS / "data" / "measured.json"  # which study has which clip: the cards say it
THEMES = {"": LIGHT, "-dark": DARK}
DRAWN = ("control", "tight", "shape", "explore", "entropy", "entropy-again", "field", "smollm2")
MOST_LINES = 8  # arms; with more their curves cannot be told apart
FEWEST_SEEDS = 5  # with fewer the intervals of single rollouts hide all else
CURVES = {"reward": "training reward", "entropy": "entropy, nats"}


def studies() -> list[str]:
    """The studies that have records, by name."""
    return sorted(path.parent.name for path in RESULTS.glob(f"*/{records.FILE}"))


@cache
def figures(name: str) -> dict[str, Any]:
    """Every figure of a study, from its records alone."""
    return analyse(kept(name))


def kept(name: str) -> records.Records:
    """The records of a study."""
    found = records.read(RESULTS / name)
    assert found is not None, name
    return found


def secondary(name: str, found: dict[str, Any]) -> list[str]:
    """The study's contrasts by its other outcomes: paired differences, not adjusted for anything."""
    runs = kept(name)
    study, lines = parse(runs.newest, name), []
    for one in found["contrasts"]:
        for outcome in list(found["outcomes"])[1:]:
            a, b = (values_of(runs, study, one[arm], one["setting"], outcome) for arm in ("arm", "against"))
            d = paired(list(a.values()), [b[seed] for seed in a], level=study.level)
            what = f"| `{one['arm']}` − `{one['against']}` | {found['outcomes'][outcome]['title']} | {len(a)} |"
            lines.append(f"{what} {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] |")
    return differences("Secondary, seed by seed, not adjusted:", lines) if lines else []


def differences(title: str, rows: list[str]) -> list[str]:
    """A table of paired differences."""
    return [title, "", "| arms | outcome | pairs | difference |", "|---|---|---|---|", *rows, ""]


def tables(name: str) -> str:
    """A study as text: what ran, its contrasts, and each arm's outcomes."""
    found = figures(name)
    runs = ", ".join(f"{n} {status}" for status, n in sorted(found["runs"].items()))
    commit = (found["origin"].get("commit") or "unknown")[:12]
    lines = [f"Runs: {runs}; {found['seconds'] / 3600:.1f} hours of training; commit `{commit}`.", ""]
    percent = f"{100 * found['level']:g} %"
    if found["contrasts"]:
        lines += [
            f"| contrast | outcome | pairs | difference, {percent} | p, Holm | equivalent? |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_contrast(one, found) for one in found["contrasts"]] + [""]
        lines += secondary(name, found)
    elif parse(kept(name).newest, name).reference:
        lines += _against_reference(found)
    for setting in found["settings"].values():
        heads = [found["outcomes"][o]["title"] for o in found["outcomes"]]
        lines += ["| arm | seeds | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
        for arm, it in setting["arms"].items():
            cells = [_cell(it["outcomes"][o]) for o in found["outcomes"]]
            lines.append(f"| `{arm}` | {it['done']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _against_reference(found: dict[str, Any]) -> list[str]:
    """Paired differences of a study that judges none: no p value, no verdict."""
    (setting, *_) = found["settings"].values()
    lines = []
    for outcome, arms in setting["differences"].items():
        for arm, d in arms.items():
            what = f"| `{arm}` − `{setting['reference']}` | {found['outcomes'][outcome]['title']} | {d['n']} |"
            lines.append(f"{what} {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] |")
    return differences("Seed by seed, not adjusted, without a verdict:", lines)


def _contrast(one: dict[str, Any], found: dict[str, Any]) -> str:
    what = f"| `{one['arm']}` − `{one['against']}` | {found['outcomes'][one['outcome']]['title']} | {one['n']} |"
    if one["mean"] is None or one["p"] is None:
        return f"{what} – | – | – |"
    same = one.get("equivalence")
    verdict = "–" if same is None else f"{'yes' if same['equivalent'] else 'no'}, margin {same['margin']:g}"
    return f"{what} {one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}] | {one['holm']:.2g} | {verdict} |"


def _cell(x: dict[str, Any]) -> str:
    if x["estimate"] is None:
        return "–"
    return f"{x['estimate']:.3f}" + ("" if x["low"] is None else f" [{x['low']:.3f}, {x['high']:.3f}]")


def draw(name: str, theme: Theme, path: Path) -> None:
    """A study's picture: means and intervals over seeds."""
    found = figures(name)
    (setting, *_) = found["settings"].values()
    with rc_context(theme.rc):
        clear = len(setting["arms"]) <= MOST_LINES and setting["seeds"] >= FEWEST_SEEDS
        picture = _lines(setting) if clear else _dots(found, setting)
        save(picture, path, theme)


def _lines(setting: dict[str, Any]) -> Figure:
    """Training reward and entropy over rollouts."""
    picture = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, curve in zip(picture.subplots(1, 2), CURVES, strict=True):
        for i, (arm, line) in enumerate(setting["curves"][curve].items()):
            ax.plot(line["at"], line["value"], color=f"C{i}", label=arm, lw=1.4)
            ax.fill_between(line["at"], line["low"], line["high"], color=f"C{i}", alpha=0.15, lw=0)
        ax.set(xlabel="rollout", title=CURVES[curve])
    ax.legend(fontsize=7, frameon=False)
    return picture


def _dots(found: dict[str, Any], setting: dict[str, Any]) -> Figure:
    """The first four outcomes, a row for each arm, in the order of the first."""
    arms, outcomes = setting["arms"], list(found["outcomes"])[:4]
    order = sorted(arms, key=lambda arm: arms[arm]["outcomes"][outcomes[0]]["estimate"])
    picture = Figure(figsize=(9, 0.8 + 0.26 * len(order)), layout="constrained")
    for ax, outcome in zip(picture.subplots(1, len(outcomes), sharey=True), outcomes, strict=True):
        for i, arm in enumerate(order):
            x = arms[arm]["outcomes"][outcome]
            ax.plot([x["low"], x["high"]], [i, i], color="C0", lw=2, alpha=0.5)
            ax.plot(x["estimate"], i, "o", color="C0", ms=5)
        ax.set_title(found["outcomes"][outcome]["title"], fontsize=9)
        ax.set_yticks(range(len(order)), order)
    return picture


def filled(page: str) -> str:
    """The page with the tables that the records give."""
    for name in studies():
        block = f"<!-- {name} -->\n\n{tables(name)}\n<!-- end of {name} -->"
        page, n = re.subn(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _: block, page, flags=re.DOTALL)  # noqa: B023
        assert n == 1, f"the page has no marks for {name}"
    return page


def measured() -> dict[str, list[str]]:
    """Clip to the studies of which it was an arm."""
    found: dict[str, list[str]] = {}
    for name in studies():
        arms = parse(kept(name).newest, name).arms.values()
        for clip in sorted({keys["clip"] for keys in arms}):
            found.setdefault(clip, []).append(name)
    return dict(sorted(found.items()))


def main() -> None:
    """Write the page and what the cards need of it, and draw the pictures."""
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    MEASURED.write_text(json.dumps(measured(), indent=1) + "\n", "utf-8")
    for name in DRAWN:
        for suffix, theme in THEMES.items():
            draw(name, theme, DOCS / "img" / f"evidence-{name}{suffix}.svg")


if __name__ == "__main__":
    main()
