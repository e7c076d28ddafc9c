"""What there is to say about a clip: from its class, its docstring, and `facts.toml` for what code cannot know."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import inspect
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bandpo._input import InputError, nearest
from bandpo.clips import CLIPS, PRESETS, get_clip
from bandpo.clips.base import Clip, Region
from bandpo.clips.gates import Gate


@dataclass(frozen=True)
class Argument:
    """One argument of a clip.

    Args:
        name: as `clip_args` has it.
        default: its default, as YAML would have it: a region is a mapping.
        text: what it is, its unit and range.
        source: where the default is from, "" where that is not known.
    """

    name: str
    default: Any
    text: str
    source: str


@dataclass(frozen=True)
class About:
    """All that a card says of a clip, but for numbers and pictures.

    Args:
        name: in the registry.
        clip: made with its defaults.
        kind: region, gate, mask, weight, penalty; "clip" where nobody has said.
        summary: one line.
        formula: lines.
        notes: paragraphs.
        source: where it and its values are from.
        arguments: in their order.
        facts: of `facts.toml`; empty for a clip that is not in it.
        presets: name to values, of the versions of it that have names.
    """

    name: str
    clip: Clip
    kind: str
    summary: str
    formula: str
    notes: tuple[str, ...]
    source: str
    arguments: tuple[Argument, ...]
    facts: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]]

    def said(self, key: str) -> tuple[str, ...]:
        """Return what `facts.toml` says under a key: no sentence, one, or several."""
        value = self.facts.get(key, ())
        return (value,) if isinstance(value, str) else tuple(value)

    def to_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        clip = self.clip
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "formula": self.formula,
            "looks_at": clip.looks_at,
            "needs": list(clip.needs),
            "uses_p": clip.uses_p,
            "opposes": clip.opposes,
            "as_bounds": clip.as_bounds,
            "paper": clip.paper,
            "defaults": {argument.name: argument.default for argument in self.arguments},
            "presets": {name: dict(values) for name, values in self.presets.items()},
        }


def about(name: str) -> About:
    """Return what there is to say about a clip.

    Args:
        name: in the registry, hyphens count as underscores; or one of `PRESETS`, for the clip that it is.

    Returns:
        It.

    Raises:
        InputError: no clip of that name; the nearest one is named.
    """
    asked, (name, *_) = name, PRESETS.get(name, (name.replace("-", "_"),))
    if name not in CLIPS:
        raise InputError(f"clip {asked!r}: must be one of {', '.join(CLIPS)}{nearest(asked, CLIPS)}")
    kind, facts = CLIPS[name], _facts().get(name, {})
    paragraphs, described = _docstring(kind)
    formula, *rest = paragraphs[1:] if len(paragraphs) > 1 else [""]
    if "=" not in formula:  # then it is no formula but prose
        formula, rest = "", [formula, *rest]
    fallback = "region" if issubclass(kind, Region) else "gate" if issubclass(kind, Gate) else "clip"
    return About(
        name=name,
        clip=get_clip(name),
        kind=facts.get("kind", fallback),
        summary=paragraphs[0],
        formula=formula or facts.get("formula", ""),
        notes=tuple(re.sub(r"\s*\n\s*", " ", note) for note in rest if note and not note.startswith("Source:")),
        source=next((note.removeprefix("Source: ") for note in map(_line, rest) if note.startswith("Source:")), ""),
        arguments=tuple(_arguments(kind, described, facts.get("values", {}))),
        facts=facts,
        presets={preset: values for preset, (of, values) in PRESETS.items() if of == name},
    )


@functools.cache
def _facts() -> dict[str, dict[str, Any]]:
    file = importlib.resources.files("bandpo.lab.cards").joinpath("facts.toml")
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _docstring(kind: type) -> tuple[list[str], dict[str, str]]:
    """The paragraphs outside of sections, a Source among them, and what the Args section says of each argument."""
    text = inspect.getdoc(kind) or ""
    blocks = [block for block in text.split("\n\n") if block.strip()]
    plain = [block for block in blocks if not re.match(r"(Args|Raises|Returns|Attributes):\n", block)]
    described: dict[str, str] = {}
    for block in blocks:
        if block.startswith("Args:\n"):
            for found in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", block, flags=re.MULTILINE):
                described[found[1]] = _line(found[2])
    return plain, described


def _line(text: str) -> str:
    return " ".join(text.split())


def _arguments(kind: type, described: Mapping[str, str], sources: Mapping[str, str]) -> list[Argument]:
    parameters = inspect.signature(kind).parameters.values()
    return [Argument(p.name, plain(p.default), described.get(p.name, ""), sources.get(p.name, "")) for p in parameters]


def plain(value: Any) -> Any:
    """Return a default as YAML or JSON would have it.

    Args:
        value: a number, a name, a tuple, None, or a region.

    Returns:
        The same; a region as the mapping that makes it.
    """
    if isinstance(value, Region):
        names: list[str] = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        return {"clip": value.name} | {name: plain(getattr(value, name)) for name in names}
    return [plain(x) for x in value] if isinstance(value, tuple) else value
