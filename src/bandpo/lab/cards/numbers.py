"""The numbers of a card, computed from the clip: what is left of the gradient, and how far a token may go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from bandpo.clips.base import Clip
from bandpo.plots.surface import (
    COARSE,
    MOVED,
    RARE,
    SIZE,
    Facts,
    Slice,
    coefficient,
    facts,
    is_flat,
    reach,
    slices,
    surface,
)

SIGNS = (1.0, -1.0)


@dataclass(frozen=True)
class Numbers:
    """What a clip does in one slice; each for A > 0 and for A < 0.

    Args:
        piece: the slice.
        kept: c / A at `RARE` probabilities (rows) and `MOVED` ratios; NaN where q would be above 1.
        flat: whether c is the same for every p.
        reach: for each of the probabilities how far it may move outward; None where nothing ends.
        facts: of its picture.
    """

    piece: Slice
    kept: tuple[list[list[float]], list[list[float]]]
    flat: bool
    reach: tuple[list[float | None], list[float | None]]
    facts: tuple[Facts, Facts]


def numbers(clip: Clip) -> list[Numbers]:
    """Return what a clip does, for each of the slices in which it is drawn.

    Args:
        clip: any clip.

    Returns:
        The numbers.
    """
    p, r = torch.meshgrid(*(torch.tensor(x, dtype=torch.float64).log() for x in (RARE, MOVED)), indexing="ij")
    found = []
    for piece in slices(clip):
        kept, far, drawn = [], [], []
        size = COARSE if clip.looks_at == "batch" and not is_flat(clip, piece) else SIZE
        for sign in SIGNS:
            kept.append(coefficient(clip, piece, p.flatten(), r.flatten(), sign).view_as(p).tolist())
            far.append(reach(clip, piece, sign))
            drawn.append(facts(surface(clip, piece, sign, size)))
        found.append(Numbers(piece, (kept[0], kept[1]), is_flat(clip, piece), (far[0], far[1]), (drawn[0], drawn[1])))
    return found


def to_dict(one: Numbers) -> dict[str, Any]:
    """Return the numbers of a slice for JSON, what cannot be as None.

    Args:
        one: the numbers.

    Returns:
        By "A>0" and "A<0": `kept` and `reach`, at the probabilities and ratios that stand beside them.
    """
    signs = {
        sign: {"kept": [[None if math.isnan(x) else x for x in row] for row in kept], "reach": far}
        for sign, kept, far in zip(("A>0", "A<0"), one.kept, one.reach, strict=True)
    }
    return {"slice": one.piece.title, "assumed": one.piece.text, "p": list(RARE), "r": list(MOVED), **signs}


def short(x: float) -> str:
    """Return a number in three digits, as a card prints it.

    Args:
        x: the number; NaN for what cannot be, infinite from 1e9 on, which is what rounding leaves of a pole.

    Returns:
        Text.
    """
    if math.isnan(x):
        return "–"
    if abs(x) >= 1e9:
        return "∞" if x > 0 else "-∞"
    if x == 0 or abs(x) < 1e-4:
        return "0" if x == 0 else f"{x:.2g}".replace("e-0", "e-")
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def alternative(name: str, found: list[Numbers]) -> str:
    """Return a picture's alternative text, made of its facts.

    Args:
        name: of the clip.
        found: from `numbers`.

    Returns:
        Text in one line without quotation marks or brackets.
    """
    said = [f"Heat maps of c / A of {name} over old probability 0.0001 to 1 and ratio 0.05 to 20."]
    for one in found:
        for sign, fact in zip(("A > 0", "A < 0"), one.facts, strict=True):
            where = f"{sign}, {one.piece.title}" if len(found) > 1 else sign
            said.append(f"{where}: {_told(fact)}.")
    return " ".join(said).replace("[", "(").replace("]", ")")


def _told(fact: Facts) -> str:
    if fact.same:
        return "c / A is r everywhere, no clip"
    parts = []
    for share, where in ((fact.zero_above, "above"), (fact.zero_below, "below")):
        if share:
            parts.append(f"no gradient on {_percent(share)} of the area {where} r = 1")
    if fact.against:
        parts.append(f"a gradient against A on {_percent(fact.against)} of the area")
    if not parts:
        parts.append("a gradient everywhere")
    return f"{', '.join(parts)}; c / A is from {short(fact.least)} to {short(fact.most)}"


def _percent(share: float) -> str:
    return "all" if share == 1 else "less than 1 %" if share < 0.01 else f"{min(share, 0.99):.0%}".replace("%", " %")
