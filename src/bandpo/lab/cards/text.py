"""A card as a page of the docs, and as text for a terminal."""

from __future__ import annotations

import importlib.resources
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from bandpo.clips import list_clips
from bandpo.clips.base import Region
from bandpo.clips.gates import Gate
from bandpo.lab.cards.about import About
from bandpo.lab.cards.numbers import Numbers, alternative, short
from bandpo.plots.surface import MOVED, RARE

MADE = "<!-- Written by `python -m bandpo.lab.cards docs` from the registry and src/bandpo/lab/cards/facts.toml. -->"
LOOKS_AT = {
    "token": "the token alone",
    "sequence": "the token's whole sequence",
    "batch": "the whole batch that it is given, in a trainer a micro-batch",
}
NEEDS = {
    "entropies": "`entropies` of the old policy, in nats",
    "rewards": "`rewards`, for their sign",
    "rollout_logps": "`rollout_logps`, of the engine that sampled",
    "state_divergence": "`state_divergence`, from `bandpo.top_k_divergence`",
}
IN_TRL = ("entropies", "rollout_logps")  # what TRL hands over of these
# of the recipe demo, what a recipe cannot do without, in its order
FROM_DEMO = (
    "task", "model", "num_generations", "per_device_train_batch_size", "steps_per_generation",
    "gradient_accumulation_steps", "max_completion_length", "max_steps", "save_steps", "learning_rate",
    "lr_scheduler_type", "loss_type", "use_cpu",
)  # fmt: skip


def page(
    it: About,
    found: list[Numbers],
    engines: Mapping[str, Mapping[str, str]] | None = None,
    studies: Iterable[str] = (),
) -> str:
    """Return the page of a clip.

    Args:
        it: the clip.
        found: its numbers.
        engines: engine to clip to how it is carried, as tests/engines/matrix.py prints it; None where nobody has.
        studies: those of docs/evidence.md with an arm of this clip, by name.

    Returns:
        Markdown.
    """
    alt, name = alternative(it.name, found), it.name
    names = list_clips()
    before, after = names[names.index(name) - 1], names[(names.index(name) + 1) % len(names)]
    parts = [
        f"{MADE}\n\n# {name}",
        f"[All clips](../clips.md) · [Atlas](../atlas.md) · [Which clip?](../which-clip.md) · "
        f"[← {before}]({before}.md) · [{after} →]({after}.md)",
        f"*{it.summary}*",
        " ".join(f"**{what[0].upper()}{what[1:]}:** {value}." for what, value in _properties(it)),
        "## Formula",
        f"```text\n{_formula(it)}\n```",
        *it.notes,
        "## Picture",
        f"![{alt}](../img/clips/{name}.svg#only-light)\n![{alt}](../img/clips/{name}-dark.svg#only-dark)",
        "What is left of the gradient; grey: nothing; hatched, and – in the tables: q would be above 1. "
        f"{_assumed(found)}[How to read it](../atlas.md#how-to-read-the-pictures).",
        *_section("What it bounds", it.said("bounds")),
        "## What it does to rare tokens",
        *it.said("rare"),
        *_kept(found),
        *_section("When it does nothing", it.said("idle")),
        *_arguments(it),
        *_bullets("Published values", (*map(_linked, it.said("published")), *_presets(it))),
        *_recipe(it),
        *_bullets("Paper, README and code disagree", it.said("disagree")),
        *_section("Measured here", _studies(studies)),
        "## Engines",
        _engines(it, engines),
        *_sources(it),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, paragraphs: Iterable[str]) -> list[str]:
    found = list(paragraphs)
    return [f"## {title}", *found] if found else []


def _bullets(title: str, items: Iterable[str]) -> list[str]:
    found = [f"- {item}" for item in items]
    return [f"## {title}", "\n".join(found)] if found else []


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _properties(it: About) -> list[tuple[str, str]]:
    clip = it.clip
    needs = ", ".join(NEEDS.get(name, f"`{name}`") for name in clip.needs)
    paper = clip.paper
    source = f"[arXiv {paper}](https://arxiv.org/abs/{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else paper
    host = "clamps with its two bounds" if clip.as_bounds else "gets advantages c / r"
    return [
        ("kind", it.kind + (", takes any region" if isinstance(clip, Gate) else "")),
        ("looks at", LOOKS_AT[clip.looks_at]),
        ("needs", needs or "log-probabilities and A alone"),
        ("depends on p", "yes" if clip.uses_p else "no"),
        ("may push against A", "yes" if clip.opposes else "no"),
        ("in a trainer", host),
        ("source", source or "ours"),
    ]


def _formula(it: About) -> str:
    rule = "c = r A,  or 0 outside and outward (A > 0 and above, or A < 0 and below)"
    hard = isinstance(it.clip, Region) and it.name != "none"
    return "\n".join([*([rule] if hard else []), *_clauses(it.formula)])


def _clauses(formula: str) -> Iterable[str]:
    """The formula in one line where that is short, else a line for each clause, which two spaces or a break end."""
    clauses = [" ".join(clause.split()) for clause in re.split(r"(?<=[,;])(?:  |\n)", formula)]
    if len("  ".join(clauses)) <= 80:
        return ["  ".join(clauses)]
    return [f"    {clause}" if clause.startswith(("or ", "0 ")) else clause for clause in clauses]


def _assumed(found: list[Numbers]) -> str:
    texts = [(one.piece.title, one.piece.text) for one in found if one.piece.text]
    if len(found) == 1:
        return f"{texts[0][1]} " if texts else ""
    return "".join(f"*{title}*: {text} " for title, text in texts)


def _kept(found: list[Numbers]) -> list[str]:
    """Tables of c / A: one for each slice and sign, or one of all where p does not matter."""
    opposes = any(fact.against for one in found for fact in one.facts)
    end = "no gradient with A past" if opposes else "no gradient outward past"
    columns = (*(f"c / A at r = {r:g}" for r in MOVED), end)
    flat, parts = [], []
    for one in found:
        for sign, kept, far in zip(("A > 0", "A < 0"), one.kept, one.reach, strict=True):
            what = f"{sign}, {one.piece.title}" if len(found) > 1 else sign
            if one.flat:
                flat.append((what, *map(short, kept[0]), _edge(far[0], None)))
                continue
            rows = [(f"{p:g}", *map(short, row), _edge(edge, p)) for p, row, edge in zip(RARE, kept, far, strict=True)]
            parts.append(_table((f"{what}: p", *columns), rows))
    tables = [*([_table(("at any p", *columns), flat)] if flat else []), *parts]
    never = any(edge is None for one in found for far in one.reach for edge in (far[:1] if one.flat else far))
    return [*tables, *(["*Never*: not before q = 1, nor down to r = .0001."] if never else [])]


def _edge(r: float | None, p: float | None) -> str:
    if r is None:
        return "never"
    return f"r = {short(r)}" + ("" if p is None else f", q = {short(r * p)}")


def _arguments(it: About) -> list[str]:
    if not it.arguments:
        return []
    rows = [(f"**{a.name}**", f"`{_flow(a.default)}`", a.text, _linked(a.source) or "–") for a in it.arguments]
    return ["## Arguments", _table(("argument", "default", "what it is", "the default is from"), rows)]


def _presets(it: About) -> list[str]:
    return [
        f"By name: `{name}` is {', '.join(f'`{key}` {value:g}' for key, value in values.items())}."
        for name, values in it.presets.items()
    ]


def recipe(it: About) -> str:
    """Return a recipe for `bandpo train` with the clip's defaults, each value with a word on where it is from.

    Args:
        it: the clip.

    Returns:
        YAML.
    """
    lines: list[tuple[str, str]] = [(f"clip: {it.name}", "")]
    shown = [a for a in it.arguments if not (isinstance(it.clip, Gate) and a.name == "region")]
    if shown:
        lines.append(("clip_args:", ""))
        lines += [(f"  {a.name}: {_flow(a.default)}", a.source) for a in shown]
    demo = (importlib.resources.files("bandpo") / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    normaliser = it.facts.get("loss_type")
    for key in FROM_DEMO:
        found = re.search(rf"^{key}: (\S+)", demo, flags=re.MULTILINE)
        if key == "loss_type" and normaliser:
            lines.append((f"{key}: {normaliser[0]}", normaliser[1]))
        elif found:
            lines.append((f"{key}: {found[1]}", "the recipe demo"))
    width = max(len(line) for line, why in lines if why)
    return "\n".join(f"{line:<{width}}  # {why}" if why else line for line, why in lines)


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(x)}" for key, x in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def in_trl(it: About) -> bool:
    """Return whether `bandpo train` can carry the clip."""
    return set(it.clip.needs) <= set(IN_TRL)


def _recipe(it: About) -> list[str]:
    if in_trl(it):
        run = f"Saved as `{it.name}.yaml`, this trains with `bandpo train {it.name}.yaml --out runs/{it.name}`:"
        return ["## Recipe", run, f"```yaml\n{recipe(it)}\n```"]
    (needed,) = it.clip.needs
    call = (
        f"import bandpo\n\nshaped = bandpo.clip_advantages(\n    logps, old_logps, advantages, mask, "
        f'clip="{it.name}", {needed}={needed}\n)'
    )
    why = f"TRL does not hand over {needed}, so `bandpo train` refuses it. In a loop of your own:"
    return ["## Recipe", why, f"```python\n{call}\n```"]


def _engines(it: About, engines: Mapping[str, Mapping[str, str]] | None) -> str:
    words = {"margins": "as its two bounds", "advantages": "as advantages c / r", "policy_loss": "as a whole loss"}
    rows = [(engine, words.get(word, word)) for engine, of in (engines or {}).items() if (word := of.get(it.name))]
    if not rows:
        return "Which trainers carry it, and how: [Engines](../engines.md)."
    return _table(("engine", "how"), rows) + "\n\nMore: [Engines](../engines.md)."


def _studies(names: Iterable[str]) -> list[str]:
    links = ", ".join(f"[{name}](../evidence.md#{name})" for name in names)
    return [f"It was an arm of these studies: {links}."] if links else []


def _sources(it: About) -> list[str]:
    links = [f"[{what}]({where})" for what, where in it.facts.get("links", ())]
    said = [_linked(re.sub("^(an|ours) ?", lambda word: word[0].capitalize(), it.source))] if it.source else []
    return _section("Sources", [*said, *([", ".join(links) + "."] if links else [])])


def _linked(text: str) -> str:
    """With a link to each paper that goes by its arXiv number alone."""
    return re.sub(r"(?<![/\d.])((?:arXiv )?(\d{4}\.\d{5}))(?![\d\]])", r"[\1](https://arxiv.org/abs/\2)", text)


def _unlinked(text: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)


def as_text(it: About, found: list[Numbers]) -> str:
    """Return the card for a terminal.

    Args:
        it: the clip.
        found: its numbers.

    Returns:
        Text.
    """
    parts = [
        f"{it.name}: {it.summary}",
        "\n".join(f"{key + ':':<20} {_unlinked(value)}" for key, value in _properties(it)),
    ]
    parts += [textwrap.indent(_formula(it), "    "), *(textwrap.fill(note, 100) for note in it.notes)]
    for title, key in (("what it bounds", "bounds"), ("rare tokens", "rare"), ("when it does nothing", "idle")):
        parts += [textwrap.fill(f"{title}: {text}", 100) for text in it.said(key)]
    for one in found:
        for sign, kept, far in zip(("A > 0", "A < 0"), one.kept, one.reach, strict=True):
            title = f"{sign}, {one.piece.title}" if len(found) > 1 else sign
            head = f"{'p':>7}" + "".join(f"{f'r = {r:g}':>10}" for r in MOVED) + f"{'ends at r':>12}"
            rows = [
                f"{'any' if one.flat else p:>7}"
                + "".join(f"{short(x):>10}" for x in row)
                + f"{'never' if end is None else short(end):>12}"
                for p, row, end in list(zip(RARE, kept, far, strict=True))[: 1 if one.flat else None]
            ]
            parts.append("\n".join([f"c / A, {title}", head, *rows]))
    if it.arguments:
        rows = [f"  {a.name} = {_flow(a.default)}: {a.text} [{a.source or 'no source'}]" for a in it.arguments]
        parts.append("\n".join(["arguments:", *(textwrap.fill(row, 100, subsequent_indent="    ") for row in rows)]))
    for title, key in (("published", "published"), ("disagreement", "disagree")):
        parts += [textwrap.fill(_unlinked(f"{title}: {text}"), 100) for text in it.said(key)]
    return "\n\n".join(part for part in parts if part.strip())
