"""`bandpo match`: the radii that are as wide as a clip."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from typing import TYPE_CHECKING, Any

import bandpo
from bandpo._input import InputError
from bandpo.cli._clip import add_clip, clip_args
from bandpo.cli._log import log_path
from bandpo.cli._parser import finish
from bandpo.clips.schedule import constant
from bandpo.operator.family import FAMILY
from bandpo.operator.radius import RADII

if TYPE_CHECKING:
    from bandpo.clips.base import Region

MOST = 1e300  # a bound beyond this is none
POINTS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9)
BY = {
    "zero_gradient": "as many of these tokens without gradient, {share:.3g} %",
    "gradient_kept": "as much of these tokens' gradient taken, {share:.3g} %",
    None: "as little taken from these tokens, nothing; these or wider",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "match",
        help="print which radius of each divergence is as wide as a clip",
        description="Print, for old probabilities p or for logged tokens, which radius of each divergence is as wide\n"
        "as PPO's eps or any other clip. There is no single answer; the output says why.",
        epilog="examples:\n  bandpo match --eps 0.2\n  bandpo match --clip clip_higher --p 0.01 0.5\n"
        "  bandpo match --eps 0.2 --tokens tokens.npz",
    )
    parser.add_argument("--eps", type=float, help="PPO's margin of the ratio, on both sides")
    parser.add_argument("--eps_high", type=float, help="the margin above, where it is another")
    add_clip(parser, "instead of --eps")
    parser.add_argument("--p", type=float, nargs="+", help="old probabilities; a few from 0.01 to 0.9 unless given")
    parser.add_argument("--tokens", metavar="FILE", help="a log of tokens, or 'example', as bandpo explain reads it")
    parser.add_argument(
        "--divergence",
        nargs="+",
        default=list(FAMILY),
        help=f"{', '.join(FAMILY)} (all of these unless given), alpha:A",
    )
    finish(parser, _match)


def _match(args: argparse.Namespace) -> None:
    clip = _clip(args)
    for p in args.p or ():
        if not 1e-300 <= p < 1:
            raise InputError(f"--p {p:g}: must be a probability, 1e-300 to 1 (not 1 itself); give one in that range")
    for name in args.divergence:
        bandpo.get_divergence(name)
    region = clip.boundary if clip.boundary is not None and clip.boundary.as_bounds else None
    if region is None and (args.p or args.tokens is None):
        raise InputError(
            f"clip {clip.name!r} has no bounds by probability: must be matched on tokens, by what it takes from them; "
            "give --tokens FILE and no --p, or another clip"
        )
    result: dict[str, Any] = {"clip": clip.name, "is": repr(clip), "divergences": args.divergence}
    if region is not None and (args.p or args.tokens is None):
        result |= _at_points(region, args.p or list(POINTS), args.divergence)
    if args.tokens is not None:
        result["tokens"] = _on_tokens(clip, region, args)
    result["why"] = _why(result)
    print(json.dumps(result) if args.json else _text(result))


def _clip(args: argparse.Namespace) -> bandpo.Clip:
    given = clip_args(args)
    if args.eps is None and args.clip is None:
        raise InputError("give --eps 0.2 or --clip NAME: one of both must be there; see bandpo match --help")
    if args.eps is not None and args.clip is not None:
        raise InputError(f"--eps {args.eps:g} --clip {args.clip}: must be one of both; leave the other out")
    if args.eps is None:
        if args.eps_high is not None:
            raise InputError(
                f"--eps_high {args.eps_high:g}: must come with --eps; for a clip give --clip_args.eps_high"
            )
        return constant(bandpo.get_clip(args.clip, **given))
    if given:
        raise InputError(f"--clip_args {given}: must come with --clip NAME; with --eps give --eps_high")
    return bandpo.Fixed(min(args.eps, 1.0), args.eps if args.eps_high is None else args.eps_high)


def _at_points(region: Region, points: list[float], divergences: list[str]) -> dict[str, Any]:
    """The radii that have the clip's bounds at each p, and those that are as wide in the mean over all p."""
    import torch

    old = torch.tensor(points, dtype=torch.float64).log()
    bounds = region.bounds(old)
    radii = {name: bandpo.implied_delta(bounds.log_low, bounds.log_high, old, name) for name in divergences}
    rows = []
    for i, p in enumerate(points):
        row: dict[str, Any] = {"p": p, "low": float(bounds.low[i]), "high": float(bounds.high[i])}
        for side, j in (("above", 1), ("below", 0)):
            inside = j == 0 or row["high"] * p < 1
            values = {name: float(both[j][i]) for name, both in radii.items()}
            row[side] = {name: x if inside and x <= RADII[1] else None for name, x in values.items()}
        rows.append(row)
    return {"rows": rows, "mean_width": _mean_width(region, old, divergences)}


def _mean_width(region: Region, old: Any, divergences: list[str]) -> dict[str, float | None]:
    """None for a divergence of which no radius is as wide."""
    found: dict[str, float | None] = {}
    for name in divergences:
        try:
            found[name] = bandpo.match_delta(region, old, divergence=name)
        except InputError:
            found[name] = None
    return found


def _on_tokens(clip: bandpo.Clip, region: Region | None, args: argparse.Namespace) -> dict[str, Any]:
    from bandpo.analysis.explain import Explainer
    from bandpo.analysis.reached import EQUAL
    from bandpo.lab.token_log import open_log

    found = open_log(log_path(args.tokens)).explained(Explainer(clip, others=False))
    asked = (*args.divergence, "eps")
    width = None if region is None else _mean_width(region, found.sample["log_p"], args.divergence)
    return {
        "file": args.tokens,
        "count": found.counts["tokens"],
        "sample": len(found.sample["log_p"]),
        "mean_width": width,
        "equivalent": {key: x for key, x in found.equivalent.items() if EQUAL.get(key, "eps") in asked},
        "remarks": found.remarks,
    }


def _why(result: dict[str, Any]) -> str:
    start = (
        "There is no single answer: a margin of the ratio lets a token's probability move by eps p, and what that "
        "costs the whole distribution depends on p"
    )
    kl = [(row["p"], row["above"]["kl"]) for row in result.get("rows", ()) if row["above"].get("kl") is not None]
    if len(kl) > 1:
        (p, a), (q, b) = min(kl, key=lambda x: x[1]), max(kl, key=lambda x: x[1])
        if b > 1.01 * a:
            start += f": the upper bound here is kl {a:.3g} at p = {p:g} and {b:.3g} at p = {q:g}"
    return (
        f"{start}. Radii of different divergences do not compare either; match what you care about: the bounds at "
        f"one p, the mean width, or what is taken from your own tokens{'' if 'tokens' in result else ' (--tokens)'}."
    )


def _text(result: dict[str, Any]) -> str:
    from bandpo.analysis.text import many, number, table

    names, lines = result["divergences"], [f"clip {result['clip']}: {result['is']}"]
    for side, bound in (("above", "high"), ("below", "low")):
        if "rows" in result:
            head = ("p", bound, *names)
            rows = [
                (
                    f"{row['p']:.10g}",
                    "none" if row[bound] > MOST else number(row[bound]),
                    *(_radius(row[side][name]) for name in names),
                )
                for row in result["rows"]
            ]
            lines += ["", f"Radius whose bound {side} r = 1 is the clip's", *table(head, rows)]
    if any(row[side][x] is None for row in result.get("rows", ()) for side in ("above", "below") for x in names):
        lines.append(f"beyond: no radius up to {RADII[1]:g} puts a bound there, past probability 1 or at a ratio of 0")
    widths = [("mean width over these p", result["mean_width"])] if "mean_width" in result else []
    tokens = result.get("tokens")
    if tokens and tokens["mean_width"]:
        some = f"{tokens['sample']:,} of " if tokens["sample"] < tokens["count"] else ""
        widths.append((f"mean width over {some}{many(tokens['count'], 'token')}", tokens["mean_width"]))
    if widths:
        lines += ["", "Radius that is as wide, as the mean of p (high - low)"]
        lines += table(("", *names), [(title, *(number(row[x]) for x in names)) for title, row in widths])
        if any(row[x] is None for _, row in widths for x in names):
            lines.append(f"-: no radius from {RADII[0]:g} to {RADII[1]:g} is as wide")
    if tokens:
        lines += ["", *_taken(tokens["equivalent"])]
        lines += [line for said in tokens["remarks"] for line in textwrap.wrap(f"- {said}", 110)]
    return "\n".join([*lines, "", *textwrap.wrap(result["why"], 110)])


def _radius(x: float | None) -> str:
    return "beyond" if x is None else f"{x:.3g}"


def _taken(same: dict[str, Any]) -> list[str]:
    from bandpo.analysis.text import nearly, number, why_none

    names = {"band_kl": "Band kl", "band_tv": "Band tv", "band_chi2": "Band chi2", "fixed": "PPO eps"}
    known = {key: f"{title} {number(same[key]['value'])}" for key, title in names.items() if same.get(key) is not None}
    if not known or not math.isfinite(same["share"]):
        return [f"By what is taken nothing matches: {why_none(same)}"]
    return [
        f"With {nearly(same, list(known))}{BY[same['by']].format(share=100 * same['share'])}:",
        f"  {', '.join(known.values())}",
    ]
