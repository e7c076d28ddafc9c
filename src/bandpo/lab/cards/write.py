"""Writes the cards, their pictures and the generated parts of other pages into a folder of docs."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError
from bandpo.clips import list_clips
from bandpo.lab.cards.about import About, about
from bandpo.lab.cards.explorer import truths
from bandpo.lab.cards.numbers import Numbers, numbers
from bandpo.lab.cards.text import page
from bandpo.plots.heat import draw_atlas, draw_clip
from bandpo.plots.look import DARK, LIGHT, Theme, save
from bandpo.plots.regions import draw_regions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEMES = {"": LIGHT, "-dark": DARK}
HARD = ("region", "gate", "mask")


def write_texts(docs: Path) -> list[Path]:
    """Write every card, and what is generated of clips.md, which-clip.md and explorer.html, where these are there.

    Args:
        docs: the folder of the docs; in it, if there, data/engines.json says which engine carries what,
            data/measured.json which studies have run with what, and data/others.csv what others measured.

    Returns:
        The files written.
    """
    (docs / "clips").mkdir(parents=True, exist_ok=True)
    engines, measured = (_data(docs / "data" / name) for name in ("engines.json", "measured.json"))
    written = []
    clips = [about(name) for name in list_clips()]
    for it in clips:
        path = docs / "clips" / f"{it.name}.md"
        path.write_text(page(it, _numbers(it), engines, measured.get(it.name, ())), encoding="utf-8")
        written.append(path)
    written += [_fill(docs / "clips.md", "registry", lambda: registry(clips))]
    written += [_fill(docs / "which-clip.md", "others", lambda: others(docs / "data" / "others.csv"))]
    written += [_fill(docs / "explorer.html", "truths", truths)]
    return [path for path in written if path.is_file()]


def write_pictures(docs: Path, names: Iterable[str] | None = None) -> list[Path]:
    """Draw the clips, and without names the pages of all of them as well.

    Args:
        docs: the folder of the docs.
        names: of the clips; None for all.

    Returns:
        The files written.
    """
    folder = docs / "img" / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: functools.partial(draw_clip, name) for name in (list_clips() if names is None else names)}
    drawn = []
    for name, draw in (chosen | PAGES if names is None else chosen).items():
        for end, theme in THEMES.items():
            drawn.append(save(draw(theme), folder / f"{name}{end}.svg", theme))
    return drawn


def hard_first() -> tuple[list[str], list[str]]:
    """Return the names of the two pages of the atlas: regions, gates and masks of tokens; and everything else."""
    hard = [name for name in list_clips() if (it := about(name)).kind in HARD and it.clip.looks_at == "token"]
    return hard, [name for name in list_clips() if name not in hard]


PAGES: dict[str, Callable[[Theme], Figure]] = {
    "atlas-regions": draw_regions,
    "atlas-hard-up": lambda theme: draw_atlas(hard_first()[0], 1.0, theme),
    "atlas-hard-down": lambda theme: draw_atlas(hard_first()[0], -1.0, theme),
    "atlas-soft-up": lambda theme: draw_atlas(hard_first()[1], 1.0, theme),
    "atlas-soft-down": lambda theme: draw_atlas(hard_first()[1], -1.0, theme),
}


def registry(clips: list[About]) -> str:
    """Return the table of all clips.

    Args:
        clips: in their order.

    Returns:
        Markdown.
    """
    lines = [
        "| name | kind | looks at | c, or its region | arguments and defaults | source |",
        "|---|---|---|---|---|---|",
    ]
    for it in clips:
        formula = " ".join(it.formula.split()).replace("|", "\\|")
        given = ", ".join(f"`{a.name}` {_brief(a.default)}" for a in it.arguments)
        needs = "".join(f", {name}" for name in it.clip.needs)
        source = it.clip.paper or "ours"
        card = f"[card](clips/{it.name}.md)"
        lines.append(
            f"| `{it.name}` | {it.kind} | {it.clip.looks_at}{needs} | {formula} | {given} | {source}, {card} |"
        )
    return "\n".join(lines)


def _brief(value: object) -> str:
    if isinstance(value, dict):
        return str(value["clip"])
    return "–" if value is None else " to ".join(f"{x:g}" for x in value) if isinstance(value, list) else str(value)


def others(file: Path) -> str:
    """Return the table of what others measured.

    Args:
        file: a CSV with a header.

    Returns:
        Markdown.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    head = "| compared | model, task | seeds | result | source |\n|---|---|---|---|---|"
    table = [
        f"| {r['compared']} | {r['model']}, {r['task']} | {r['seeds']} | {r['result']} | "
        f"[{r['source']}]({r['url']}), {r['date']} |"
        for r in rows
    ]
    return "\n".join([head, *table])


def _data(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _numbers(it: About) -> list[Numbers]:
    return numbers(it.clip)


def _fill(path: Path, name: str, make: Callable[[], str]) -> Path:
    """Put text between the two marks of that name in a page that is there."""
    if path.is_file():
        text, start, end = path.read_text(encoding="utf-8"), f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise InputError(f"{path}: must have the marks {start} and {end}, each on a line of its own")
        path.write_text(f"{before}{start}\n\n{make()}\n\n{end}{after}", encoding="utf-8")
    return path
