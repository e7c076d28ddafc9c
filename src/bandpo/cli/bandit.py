"""`bandpo bandit`: the exact microscope."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bandpo._input import InputError
from bandpo.cli._parser import finish

Tell = Callable[[str, str, float], None]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bandit",
        help="train one softmax under each clip: hundreds of seeds in seconds, and the exact drift of entropy",
        description="Train a softmax over a few actions, or a short chain of them, under several clips: hundreds of\n"
        "seeds at once. Prints outcomes with 95 % intervals, and under random rewards what each clip alone\n"
        "does to entropy, as an exact sum beside a simulation. Without a file: two small settings.",
        epilog="examples:\n  bandpo bandit\n  bandpo bandit studies/bandit.yaml --html bandit.html\n"
        "  bandpo bandit studies/bandit.yaml --setting noise --seeds 64 --json",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="settings in YAML; see the bandit page of the docs")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each arm, instead of what the file says")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the drift of entropy, a row for each clip")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    finish(parser, _bandit)


def _bandit(args: argparse.Namespace) -> None:
    from bandpo.lab.bandit_config import BUILT_IN, choose, read_study
    from bandpo.lab.bandit_exact import DRIFTS, has_drift
    from bandpo.lab.bandit_outcomes import run_study
    from bandpo.lab.bandit_table import as_text, drift_csv

    data = BUILT_IN if args.file is None else _read(args.file)
    study = choose(read_study(data, args.file or "the built-in settings"), args.setting, args.seeds)
    for option, path in (("--html", args.html), ("--csv", args.csv)):
        _check_file(option, path)
    if args.csv is not None and not any(has_drift(setting) for setting in study.settings.values()):
        raise InputError(f"--csv {args.csv}: no setting has a drift of entropy; {DRIFTS}")
    arms = sum(len(setting.arms) for setting in study.settings.values())
    with _progress(arms) as tell:
        result = {"command": _command(args), **run_study(study, tell)}
    if args.html is not None:
        from bandpo.lab.bandit_page import write_page

        result["html"] = str(write_page(result, result["command"], args.html))
    if args.csv is not None:
        args.csv.write_text(drift_csv(result), "utf-8")
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        print(as_text(result) + (f"\n\npage: {result['html']}" if args.html is not None else ""))


def _read(file: str) -> Any:
    from bandpo.lab.reading import read_yaml

    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"{file}: cannot be read ({why}); give a YAML file of settings, or none") from None
    return read_yaml(text, file)


def _check_file(option: str, path: Path | None) -> None:
    """Raise before the run for what would fail after it."""
    from bandpo.plots import need_matplotlib

    if path is None:
        return
    if option == "--html":
        need_matplotlib()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: must be a file in a folder that exists; give one")


def _command(args: argparse.Namespace) -> str:
    """Return the command as it would be typed again."""
    words = ["bandpo", "bandit", *([args.file] if args.file else [])]
    words += [word for name in args.setting for word in ("--setting", name)]
    words += ["--seeds", str(args.seeds)] if args.seeds is not None else []
    words += ["--csv", str(args.csv)] if args.csv is not None else []
    words += ["--html", str(args.html)] if args.html is not None else []
    return shlex.join([*words, *(["--json"] if args.json else [])])


@contextmanager
def _progress(arms: int) -> Iterator[Tell]:
    """Say on stderr how far it is: a bar on a terminal where there is rich, else a line for each arm."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _lines()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    with Progress(console=console, transient=True) as progress:
        task, done = progress.add_task("", total=arms), 0

        def tell(setting: str, arm: str, share: float) -> None:
            nonlocal done
            counted = 0 if arm == "drift" else share
            progress.update(task, description=f"{setting}: {arm}", completed=done + counted)
            done += int(counted)

        yield tell


def _lines() -> Tell:
    started = time.perf_counter()

    def tell(setting: str, arm: str, share: float) -> None:
        if share >= 1:
            print(f"{setting}: {arm}, {time.perf_counter() - started:.1f} s", file=sys.stderr)

    return tell
