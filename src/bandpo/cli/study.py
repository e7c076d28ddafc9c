"""`bandpo study`: arms by settings by seeds, each a run; what they say is the report's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError

if TYPE_CHECKING:
    from bandpo.lab.study.file import Study

EPILOG = """\
STUDY.yaml says what is asked, what is run and how it is judged:

  question, hypotheses, analysis, design   texts, which the report shows first
  recipe       a recipe of `bandpo train`: a name, a file, or a mapping of keys
  arms         a name for each, and the recipe's keys that make it: {none: none, narrow: {clip_args: {delta: 0.02}}}
  seeds        [0, 1, 2], or 100-119
  settings     as arms, crossed with them; a setting may have arms, seeds and a question of its own
  outcomes     what is measured, the primary one first; margin: the largest difference that does not matter
  reference    the arm that others are compared with; contrasts: the comparisons that the study is run for
  warmup       true: the tiny model of a seed is made once and shared by the arms; {models: 3}: three of them

The same command goes on where a study was killed. Words --key value are keys of the recipe that win over the study's.

examples:
  bandpo study studies/shape.yaml --out runs/shape --jobs 2
  bandpo study studies/shape.yaml --out runs/short --seeds 1 --max_steps 32
  bandpo study studies/shape.yaml --out runs/shape --emit | parallel -j 8
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "study",
        help="train several arms with several seeds, and say what the seeds say",
        description="Train every arm of a study in every setting with every seed, some at a time, and write one page\n"
        "with intervals, paired differences and equivalence. Killed at any moment, it goes on where it was.",
        usage="bandpo study STUDY.yaml --out DIR [options] [--key value ...]",
        epilog=EPILOG,
    )
    parser.add_argument("file", type=Path, metavar="STUDY.yaml", help="the study")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the study's folder")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds of each setting")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train, instead of what the recipe says")
    parser.add_argument("--emit", action="store_true", help="print one command a line for each run left, and run none")
    parser.add_argument("--resume", action="store_true", help="refuse to start a study that is not there yet")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line; the last holds every figure")
    parser.set_defaults(handler=_study, overrides=[], parser=parser)


def _study(args: argparse.Namespace) -> int:
    from bandpo.lab.study.file import read_study

    for name in ("jobs", "seeds"):
        if (value := getattr(args, name)) is not None and not 1 <= value <= 10_000:
            raise InputError(f"--{name} {value}: must be a whole number from 1 to 10000")
    return _run(read_study(args.file), args)


def short_form(args: argparse.Namespace) -> int:
    """Run `bandpo train RECIPE --seeds 0 1 2 --compare none,fixed,band` as a study.

    Args:
        args: recipe, seeds, compare (clips with commas, or None), out, overrides and json.

    Returns:
        Exit code.
    """
    from bandpo.lab.study.file import as_seeds
    from bandpo.lab.study.short import short_study

    clips = args.compare.split(",") if isinstance(args.compare, str) else []
    if any(word.split("=")[0] == "--clip" for word in args.overrides):
        raise InputError("--clip with --seeds: must be left out; name the clips, as in --compare none,fixed,band")
    try:
        seeds = [seed for word in args.seeds for seed in as_seeds(int(word) if word.isdecimal() else word)]
    except ValueError as error:
        raise InputError(f"--seeds {' '.join(args.seeds)}: {error}") from None
    study = short_study(args.recipe, seeds, clips)
    given = {"jobs": 1, "seeds": None, "device": None, "emit": False, "resume": False, "report": None}
    out = args.out or Path("runs") / f"{study.name}-study"
    return _run(study, argparse.Namespace(**{**given, "out": out, "overrides": args.overrides, "json": args.json}))


def _run(study: Study, args: argparse.Namespace) -> int:
    from bandpo.lab.study.folder import StudyFolder
    from bandpo.lab.study.matrix import plan
    from bandpo.lab.study.show import showing
    from bandpo.lab.study.whole import emit, finish, make

    folder = StudyFolder(args.out.absolute())
    if args.resume and not folder.has_run():
        raise InputError(f"--resume: there is no study in {args.out}; name its folder with --out")
    words = list(args.overrides)
    if args.device:
        words += ["--use_cpu", "true" if args.device == "cpu" else "false"]
    runs = plan(study, folder.path, words, args.seeds)
    if args.emit:
        print("\n".join(emit(study, folder, runs, words, jobs=args.jobs)))
        return 0
    try:
        with showing(folder, runs, as_json=args.json) as shown:
            work = make(study, folder, runs, words, jobs=args.jobs, tell=shown.tell, watch=shown.watch, note=shown.note)
    except KeyboardInterrupt:
        print("bandpo: interrupted; the same command goes on where it was", file=sys.stderr)
        return 1
    result = finish(folder, work, args.report)
    print(json.dumps(result, allow_nan=False) if args.json else shown.closing(result))
    for name, why in work.failed.items():
        print(f"bandpo: run {name} did not end well: {why}", file=sys.stderr)
    return 1 if work.failed else 0
