"""`bandpo doctor`: what is installed, and what fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bandpo.cli._parser import finish


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, on which device, and whether each engine's hook fits",
        description="Print versions and the device, and check that each installed engine still has the place where\n"
        "bandpo puts its bounds. Exit code 1 when an installed engine does not fit.",
        epilog="example:\n  bandpo doctor --json",
    )
    finish(parser, _doctor)


def _doctor(args: argparse.Namespace) -> int:
    from bandpo import doctor

    found = doctor.examine()
    print(json.dumps(found) if args.json else doctor.as_text(found))
    return int(any(engine["fits"] is False for engine in found["engines"]))
