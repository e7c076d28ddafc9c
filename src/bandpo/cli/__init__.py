"""The ``bandpo`` command; a file here is one command, and stands once in `COMMANDS`.

Exit codes: 0 done, 2 the user's input was wrong (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import bandpo
from bandpo._input import InputError
from bandpo.cli import bounds, doctor, report
from bandpo.cli._parser import Parser, refuse
from bandpo.train.command import add_parser as add_train
from bandpo.verl.command import add_parser as add_verl

# in the order of `bandpo --help`
COMMANDS: dict[str, Callable[[Any], object]] = {
    "bounds": bounds.add_parser,
    "train": add_train,
    "verl": add_verl,
    "report": report.add_parser,
    "doctor": doctor.add_parser,
}


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
    for add in COMMANDS.values():
        add(commands)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the words; what no option takes is an error that names the nearest option."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:  # `train` and `verl` take the keys of a recipe, and check them themselves
        args.overrides = rest
    elif rest:
        refuse(getattr(args, "parser", parser), rest[0])
    if "handler" not in args:
        *most, last = COMMANDS
        raise InputError(f"no command given: must be {', '.join(most)} or {last}; see bandpo --help")
    return args
