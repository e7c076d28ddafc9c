"""What the explorer of the docs has from the library: clips, their arguments, and results to check itself by."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from bandpo._input import InputError
from bandpo.clips import get_clip, list_clips
from bandpo.clips.base import Clip, Region
from bandpo.lab.cards.about import about
from bandpo.operator.family import FAMILY
from bandpo.operator.tokens import Tokens

# arguments that are not the defaults, of clips whose formula has a branch that the defaults do not reach
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "band": [{"divergence": name} for name in FAMILY] + [{"delta": 0.5}, {"cap": 3.0}],
    "cispo": [{"eps_low": 0.3, "eps_high": 4.0}],
    "dppo_tv": [{"delta": 0.4, "cap": 2.0}],
    "dppo_kl": [{"delta": 0.01, "cap": None}],
    "dgpo": [{"n": 2.0, "m": 0.5}],
    "ce_gppo": [{"beta_low": 0.2, "cap": None}],
    "drpo": [{"eps": 0.15}],
    "maspo": [{"sigma": 0.3, "alpha": 0.5, "beta": 2.0}],
}
# where the explorer's controls may go, as far as the library lets them
RANGES: dict[str, tuple[float, float]] = {
    "delta": (1e-4, 2.0),
    "eps": (0.01, 20.0),
    "eps_low": (0.0, 1.0),
    "eps_high": (0.0, 5.0),
    "cap": (1.0, 100.0),
    "floor": (0.0, 1.0),
    "tau_pos": (0.1, 10.0),
    "tau_neg": (0.1, 10.0),
    "n": (0.1, 10.0),
    "m": (0.1, 10.0),
    "sigma": (0.1, 10.0),
    "alpha": (0.0, 0.99),
    "beta": (0.001, 10.0),
    "beta_low": (0.0, 2.0),
    "beta_high": (0.0, 2.0),
    "slope": (0.1, 50.0),
}
P, R = (0.0004, 0.012, 0.09, 0.37, 0.84), (0.09, 0.71, 1.13, 3.4)


def explorable() -> list[str]:
    """Return the clips that look at one token alone and need nothing but its log-probabilities and A."""
    return [name for name in list_clips() if (clip := get_clip(name)).looks_at == "token" and not clip.needs]


def accepts(name: str, key: str, value: float) -> bool:
    """Return whether a clip takes that value of an argument, the others at their defaults."""
    try:
        get_clip(name, **{key: value})
    except InputError:
        return False
    return True


def limits(name: str, defaults: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return for each argument in `RANGES` the part of its range that the clip accepts, to a thousandth."""
    found = {}
    for key in defaults.keys() & RANGES.keys():
        least, most = RANGES[key]
        start = (least + most) / 2 if defaults[key] is None else defaults[key]
        found[key] = (_end(name, key, start, least), _end(name, key, start, most))
    return {key: found[key] for key in defaults if key in found}


def _end(name: str, key: str, start: float, end: float) -> float:
    """Return the end, or where the clip refuses it, the last thousandth from the start to it that is accepted."""
    if accepts(name, key, end):
        return end
    good, bad = round(start * 1000), round(end * 1000)
    while abs(bad - good) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if accepts(name, key, middle / 1000) else (good, middle)
    return good / 1000


def results(clip: Clip, p: list[float], r: list[float], signs: list[float]) -> list[list[Any]]:
    """Return what a clip does to tokens.

    Args:
        clip: one that looks at the token alone.
        p: old probabilities.
        r: ratios, r p below 1.
        signs: of A, 1 or -1.

    Returns:
        For each token [p, r, sign, c / A, low, high]: the bounds None for a clip without a region, "inf" where there is
        no bound above.
    """
    log_p, log_r, advantages = (torch.tensor(x, dtype=torch.float64) for x in (p, r, signs))
    log_p, log_r = log_p.log(), log_r.log()
    tokens = Tokens((log_p + log_r)[None], log_p[None], advantages[None])
    c = (clip.coefficient(tokens)[0] / advantages + 0.0).tolist()
    region = clip if isinstance(clip, Region) else clip.boundary
    ends: list[list[Any]] = [[None] * len(p)] * 2
    if region is not None:
        bounds = region.limits(tokens)
        sides = (bounds.log_low[0].tolist(), bounds.log_high[0].tolist())
        ends = [[_short(math.exp(min(x, 700.0))) for x in side] for side in sides]
    return [[*row[:3], _short(row[3]), *row[4:]] for row in zip(p, r, signs, c, *ends, strict=True)]


def _short(x: float) -> float | str:
    return "inf" if x > 1e30 else float(f"{x:.8g}") if x > 1e-30 or x < 0 else 0


def truths() -> str:
    """Return the clips and the results as the script element that the explorer reads."""
    at = [(p, r, sign) for p in P for r in R for sign in (1.0, -1.0) if p * r < 1][::2]
    clips, found = [], []
    for name in explorable():
        it = about(name)
        defaults = {a.name: a.default for a in it.arguments if a.name != "region" and not isinstance(a.default, dict)}
        optional = [key for key in defaults if "or None" in next(a.text for a in it.arguments if a.name == key)]
        row = {"name": name, "kind": it.kind, "summary": it.summary, "defaults": defaults, "optional": optional}
        clips.append({**row, "limits": limits(name, defaults)})
        for i, args in enumerate([{}, *ARGUMENTS.get(name, [])]):
            some = at if not args else at[i % 2 :: 2]
            points = results(get_clip(name, **args), *(list(x) for x in zip(*some, strict=True)))
            found.append({"clip": name, "args": args, "points": points})
    own, theirs = (",\n".join(map(json.dumps, rows)) for rows in (clips, found))
    return (
        f'<script type="application/json" id="truths">\n{{"clips": [\n{own}\n], "truths": [\n{theirs}\n]}}\n</script>'
    )
