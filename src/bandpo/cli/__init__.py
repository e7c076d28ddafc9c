"""The ``bandpo`` command; a file here is one command, and stands once in `COMMANDS`.

Exit codes: 0 done, 2 the user's input was wrong (one line on stderr), 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import bandpo
from bandpo._input import InputError
from bandpo.cli import bandit, bounds, clips, doctor, eval, explain, match, report, study, train, verl
from bandpo.cli._parser import Parser, refuse
from bandpo.lab.page import visible

# in the order of `bandpo --help`
COMMANDS: dict[str, Callable[[Any], object]] = {
    "explain": explain.add_parser,
    "bounds": bounds.add_parser,
    "clips": clips.add_parser,
    "match": match.add_parser,
    "bandit": bandit.add_parser,
    "train": train.add_parser,
    "verl": verl.add_parser,
    "eval": eval.add_parser,
    "study": study.add_parser,
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
        code = int(args.handler(args) or 0)
        sys.stdout.flush()
        return code
    except InputError as error:
        print("bandpo:", visible(error).replace("\n", "⟨U+000A⟩"), file=sys.stderr)  # a file's name may hold one
        return 2
    except BrokenPipeError:  # who read the output has gone; Python must not write to it again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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
