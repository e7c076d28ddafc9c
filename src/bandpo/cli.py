"""The ``bandpo`` command: bounds, train, verl, report, doctor.

Exit codes: 0 done, 2 the user's input was wrong (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import bandpo
from bandpo._checks import InputError, nearest
from bandpo.family import FAMILY
from bandpo.train.command import add_parser as add_train
from bandpo.verl.command import add_parser as add_verl


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors that name the nearest choice, and that abbreviates nothing."""

    def __init__(self, *args: Any, **named: Any) -> None:
        """Take what ArgumentParser takes."""
        named |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **named)

    def error(self, message: str) -> NoReturn:
        """Raise the message as an InputError."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[^\s,']+", found[2]))
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``bandpo``; those of the process when None.

    Returns:
        The exit code.
    """
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        return int(args.handler(args) or 0)
    except InputError as error:
        print(f"bandpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bandpo: interrupted", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = Parser(
        prog="bandpo",
        description="Trust-region clip bounds for reinforcement learning of language models.",
        epilog="examples:\n  bandpo bounds --p 0.08\n  bandpo train demo --out runs/demo\n"
        "  bandpo report runs/demo --out report.html\n  bandpo doctor",
    )
    parser.add_argument("--version", action="version", version=f"bandpo {bandpo.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_bounds(commands)
    add_train(commands)
    add_verl(commands)
    _add_report(commands)
    _add_doctor(commands)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the words; what no option takes is an error that names the nearest option."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:  # `train` and `verl` take the keys of a recipe, and check them themselves
        args.overrides = rest
    elif rest:
        _refuse(getattr(args, "parser", parser), rest[0])
    if "handler" not in args:
        raise InputError("no command given: must be bounds, train, verl, report or doctor; see bandpo --help")
    return args


def _refuse(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """Raise for a word that the parser does not know, naming the nearest option."""
    options = [option for action in parser._actions for option in action.option_strings]
    word = word.split("=")[0]
    raise InputError(f"{word}: {parser.prog} does not take it{nearest(word, options)}; see {parser.prog} --help")


# ---------------------------------------------------------------- bounds


def _add_bounds(commands: Any) -> None:
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
    _finish(parser, _bounds)


def _bounds(args: argparse.Namespace) -> None:
    import torch

    given = {k: v for k in ("delta", "divergence", "cap") if (v := getattr(args, k)) is not None}
    for p in args.p:  # the ratio 1/p must stay a number
        if not 1e-300 <= p <= 1:
            raise InputError(f"--p {p:g}: must be a probability, 1e-300 to 1; give one in that range")
    old_logps = torch.tensor(args.p, dtype=torch.float64).log()
    band = bandpo.band(old_logps, **given)
    usual = bandpo.get_clip("clip-higher").bounds(old_logps)
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
    # A drawing needs no cap of its own where none was asked for: Band's default cap would hide the operator.
    own = bandpo.Band(divergence=result["divergence"], delta=result["delta"], cap=result["cap"])
    others = {k: v for k, v in plots.readme_clips().items() if not k.startswith("Band")}
    points = tuple(row["p"] for row in result["rows"] if row["p"] < 1)
    return plots.save(plots.draw_bounds({name: own, **others}, points), path)


# ---------------------------------------------------------------- report and doctor


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write one HTML page about one or several runs",
        description="Write one self-contained HTML page about runs of `bandpo train`; the arms that --compare\n"
        "put below a run's folder come with it.",
        epilog="example:\n  bandpo report runs/demo runs/demo-seed1 --out report.html",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output folder of `bandpo train`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    _finish(parser, _report)


def _report(args: argparse.Namespace) -> None:
    from bandpo.train.history import with_arms
    from bandpo.train.report import write_report

    runs = [run for folder in args.folders for run in with_arms(folder)]
    page = write_report(runs, args.out)
    print(json.dumps({"report": str(page), "runs": [str(run) for run in runs]}) if args.json else page)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, on which device, and whether each engine's hook fits",
        description="Print versions and the device, and check that each installed engine still has the place where\n"
        "bandpo puts its bounds. Exit code 1 when an installed engine does not fit.",
        epilog="example:\n  bandpo doctor --json",
    )
    _finish(parser, _doctor)


def _doctor(args: argparse.Namespace) -> int:
    from bandpo import doctor

    found = doctor.examine()
    print(json.dumps(found) if args.json else doctor.as_text(found))
    return int(any(engine["fits"] is False for engine in found["engines"]))


def _finish(parser: argparse.ArgumentParser, handler: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=handler, parser=parser)


if __name__ == "__main__":
    sys.exit(main())
