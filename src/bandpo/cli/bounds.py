"""`bandpo bounds`: a table of ratio bounds, and a picture."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import bandpo
from bandpo._input import InputError
from bandpo.cli._parser import finish
from bandpo.operator.family import FAMILY


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bounds",
        help="print the clip bounds at given probabilities",
        description="Print Band's ratio bounds at old probabilities p, and the probabilities p*low and p*high that a\n"
        "token may reach, beside those of Clip-Higher (0.2 / 0.28).",
        epilog="example:\n  bandpo bounds --p 0.01 0.08 0.5 --delta 0.05 --divergence kl --plot bounds.svg",
    )
    parser.add_argument("--p", type=float, nargs="+", required=True, help="old probabilities, 1e-300 to 1")
    parser.add_argument("--delta", type=float, help="radius of the trust region (nats for kl)")
    parser.add_argument("--divergence", help=f"{', '.join(FAMILY)} or alpha:A")
    parser.add_argument("--cap", type=float, help="ceiling of the upper ratio bound; none unless given")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the bounds against p: .svg, .png or .pdf")
    finish(parser, _bounds)


def _bounds(args: argparse.Namespace) -> None:
    import torch

    given = {k: v for k in ("delta", "divergence", "cap") if (v := getattr(args, k)) is not None}
    for p in args.p:  # the ratio 1/p must stay a number
        if not 1e-300 <= p <= 1:
            raise InputError(f"--p {p:g}: must be a probability, 1e-300 to 1; give one in that range")
    old_logps = torch.tensor(args.p, dtype=torch.float64).log()
    band = bandpo.band(old_logps, **given)
    usual = bandpo.Fixed(0.2, 0.28).bounds(old_logps)
    rows = [
        {"p": p, **_row(old_logps[i], band, i), "clip_higher": _row(old_logps[i], usual, i)}
        for i, p in enumerate(args.p)
    ]
    defaults = {k: v.default for k, v in inspect.signature(bandpo.band).parameters.items() if k != "old_logps"}
    result = {**defaults, **given, "rows": rows}
    if args.plot:
        result["plot"] = str(_plot(result, args.plot))
    print(json.dumps(result) if args.json else _bounds_table(result))


def _row(old_logp: Any, bounds: bandpo.Bounds, i: int) -> dict[str, float]:
    """The bounds at one p, as ratios and as the probabilities they reach (at most 1)."""
    low, high = bounds.log_low[i], bounds.log_high[i]
    return {
        "low": low.exp().item(),
        "high": high.exp().item(),
        "p_low": (old_logp + low).exp().item(),
        "p_high": (old_logp + high).clamp(max=0).exp().item(),
    }


def _bounds_table(result: dict[str, Any]) -> str:
    cap = "no cap" if result["cap"] is None else f"cap {result['cap']:g}"
    lines = [
        f"Band: divergence {result['divergence']}, delta {result['delta']:g}, {cap}",
        "",
        f"{'':>10}  {'ratio bounds':^20}  {'p may move to':^20}  {'with Clip-Higher':^20}",
        f"{'p':>10}  {'low':>9}  {'high':>9}  {'p*low':>9}  {'p*high':>9}  {'from':>9}  {'to':>9}",
    ]
    for row in result["rows"]:
        usual = row["clip_higher"]
        numbers = [row["low"], row["high"], row["p_low"], row["p_high"], usual["p_low"], usual["p_high"]]
        lines.append(f"{row['p']:>10.4g}  " + "  ".join(f"{number:>9.4g}" for number in numbers))
    if "plot" in result:
        lines += ["", f"drawn: {result['plot']}"]
    return "\n".join(line.rstrip() for line in lines)


def _plot(result: dict[str, Any], path: Path) -> Path:
    from bandpo import plots

    name = f"Band, {result['divergence']} {result['delta']:g}"
    own = bandpo.Band(divergence=result["divergence"], delta=result["delta"], cap=result["cap"])
    others = {k: v for k, v in plots.readme_clips().items() if not k.startswith("Band")}
    points = tuple(row["p"] for row in result["rows"] if row["p"] < 1)
    return plots.save(plots.draw_bounds({name: own, **others}, points), path)
