"""`bandpo report`: one page about runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bandpo.cli._parser import finish


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page about one or several runs",
        description="Write one self-contained HTML page about runs of `bandpo train`; the arms that --compare\n"
        "put below a run's folder come with it.",
        epilog="example:\n  bandpo report runs/demo runs/demo-seed1 --out report.html",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output folder of `bandpo train`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    finish(parser, _report)


def _report(args: argparse.Namespace) -> None:
    from bandpo.train.history import with_arms
    from bandpo.train.report import write_report

    runs = [run for folder in args.folders for run in with_arms(folder)]
    page = write_report(runs, args.out)
    print(json.dumps({"report": str(page), "runs": [str(run) for run in runs]}) if args.json else page)
