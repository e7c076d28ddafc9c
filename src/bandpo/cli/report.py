"""`bandpo report`: one page about runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bandpo._input import InputError
from bandpo.cli._parser import finish


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page about one or several runs",
        description="Write one self-contained HTML page about runs of `bandpo train`, with the arms that --compare\n"
        "put below a run's folder, or about one study, from its records alone.",
        epilog="examples:\n  bandpo report runs/demo runs/demo-seed1 --out report.html\n"
        "  bandpo report runs/shape --out shape.html",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="folder of `bandpo train`, or one of `bandpo study`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    finish(parser, _report)


def _report(args: argparse.Namespace) -> None:
    from bandpo.lab.report.page import write_report
    from bandpo.lab.report.runs import with_arms
    from bandpo.lab.study.whole import is_study, report

    if studies := [folder for folder in args.folders if is_study(folder)]:
        if len(args.folders) > 1:
            raise InputError(f"{studies[0]}: is a study, which has a page of its own; give it alone")
        result = report(studies[0], args.out)
        print(json.dumps(result, allow_nan=False) if args.json else result["report"])
        return
    runs = [run for folder in args.folders for run in with_arms(folder)]
    page = write_report(runs, args.out)
    print(json.dumps({"report": str(page), "runs": [str(run) for run in runs]}) if args.json else page)
