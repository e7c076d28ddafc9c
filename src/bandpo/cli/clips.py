"""`bandpo clips`: the registry as a table, one clip's card, and a picture of all regions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bandpo.cli._parser import finish


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "clips",
        help="list every clip, or say what one of them does",
        description="Print every clip of the registry: its kind, what it looks at and needs, its source and its\n"
        "defaults; or, with a NAME, what that clip does to the gradient, and where its values are from.",
        epilog="examples:\n  bandpo clips\n  bandpo clips dcpo\n  bandpo clips --plot regions.svg",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a clip, for its card")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw every region, or NAME's gradient: .svg, .png or .pdf"
    )
    finish(parser, _clips)


def _clips(args: argparse.Namespace) -> None:
    from bandpo.clips import list_clips
    from bandpo.lab.cards import about

    result: dict[str, Any]
    if args.name is None:
        rows = [about(name).to_dict() for name in list_clips()]
        result, text = {"clips": rows}, _table(rows)
    else:
        result, text = _card(args.name)
    if args.plot is not None:
        result["plot"] = str(_plot(result.get("name"), args.plot))
        text += f"\n\ndrawn: {result['plot']}"
    print(json.dumps(result) if args.json else text)


def _card(name: str) -> tuple[dict[str, Any], str]:
    """The card of one clip, for programs and for people."""
    from bandpo.lab.cards import about
    from bandpo.lab.cards.numbers import numbers, to_dict
    from bandpo.lab.cards.text import as_text

    it = about(name)
    found = numbers(it.clip)
    return it.to_dict() | {"slices": [to_dict(one) for one in found]}, as_text(it, found)


def _table(rows: list[dict[str, Any]]) -> str:
    heads = ("name", "kind", "looks at", "needs", "source", "defaults")
    lines = [heads]
    for row in rows:
        needs, given = ", ".join(row["needs"]) or "-", row["defaults"].items()
        defaults = ", ".join(f"{key} {_brief(value)}" for key, value in given if value is not None)
        lines.append((row["name"], row["kind"], row["looks_at"], needs, row["paper"] or "ours", defaults))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    presets = {name: values for row in rows for name, values in row["presets"].items()}
    named = [f"{name} ({', '.join(f'{k} {v:g}' for k, v in values.items())})" for name, values in presets.items()]
    return "\n".join([*table, "", f"by name: {', '.join(named)}", "one of them: bandpo clips NAME"])


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return str(value["clip"])
    if isinstance(value, list):
        return "..".join(map(_brief, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plot(name: str | None, path: Path) -> Path:
    from bandpo.plots import need_matplotlib, save

    need_matplotlib()
    from bandpo.plots.heat import draw_clip
    from bandpo.plots.regions import draw_regions

    return save(draw_regions() if name is None else draw_clip(name), path)
