"""What `bandpo train` and `bandpo verl` share: the folder, the keys that no option takes, and how a run ends."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError

if TYPE_CHECKING:
    from bandpo.lab.reading import RecipeFile
    from bandpo.lab.run.display import Display
    from bandpo.lab.run.folder import RunFolder
    from bandpo.lab.run.session import Session

ALMOST_NOTHING = 1_000_000  # bytes


def add_parser(
    commands: Any, name: str, handler: Callable[[argparse.Namespace], int], recipes: str, **texts: str
) -> argparse.ArgumentParser:
    """Add a command that runs a recipe; what its options leave over are keys of the recipe, in `overrides`."""
    parser: argparse.ArgumentParser = commands.add_parser(name, **texts)
    parser.add_argument("recipe", metavar="RECIPE", help=recipes)
    parser.add_argument(
        "--out",
        type=_folder,
        metavar="DIR",
        help="the run's folder (default: the first free one of runs/RECIPE, runs/RECIPE-2, ...)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last good checkpoint of the run in --out")
    parser.add_argument("--requeue", action="store_true", help="as --resume, but start the run where there is none yet")
    parser.add_argument(
        "--smoke", action="store_true", help="the same at the smallest size: does everything fit together?"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout; the last is the result")
    parser.set_defaults(handler=handler, overrides=[], parser=parser)
    return parser


def _folder(text: str) -> Path:
    if not text.strip():  # a variable of the shell that is not set, say: the folder one stands in is not meant
        raise argparse.ArgumentTypeError("must be the name of a folder, as in --out runs/mine")
    return Path(text)


def read(args: argparse.Namespace, engine: str) -> tuple[RecipeFile, str]:
    """Return the recipe of a command line, with `--smoke` at that size, and what this changed."""
    from bandpo.lab.reading import read_recipe
    from bandpo.lab.smoke import shrink

    file = read_recipe(args.recipe)
    return shrink(file, engine) if args.smoke else (file, "")


def run(args: argparse.Namespace, engine: str, flags: Sequence[str] = ()) -> int:
    """Run a recipe with an engine; `flags` are further ones of the command that belong to the run, without "--".

    Returns:
        Exit code: 0 done, 1 stopped or interrupted.
    """
    from bandpo.lab.run.display import Display, HumanDisplay, JsonDisplay
    from bandpo.lab.run.folder import RunFolder
    from bandpo.lab.run.session import open_session

    # The command promises to need no network; this is the one thing in it that would use it unasked.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    (file, changed), main = read(args, engine), os.environ.get("RANK", "0") == "0"  # torchrun's name for it
    resume = args.resume or args.requeue
    folder = RunFolder(args.out or default_out(f"{file.name}{'-smoke' if args.smoke else ''}", resume))
    if engine == "verl":
        folder = RunFolder(folder.path.absolute())
    shown = folder.path if args.out is None or engine != "verl" else args.out
    flagged = [f"--{name}" for name in (*flags, "smoke") if getattr(args, name)]

    def command(words: Sequence[str]) -> str:
        return shlex.join([*_program(), _NAMES[engine], args.recipe, *words, *flagged, "--out", str(shown)])

    display: Display = Display() if not main else JsonDisplay() if args.json else HumanDisplay()
    go_on = f"go on with: {command(args.overrides)} --resume"
    try:
        with _nothing_asked(), folder.claimed() if main else nullcontext():
            if args.requeue and not folder.has_run():
                display.note(f"{folder.path}: no run there yet, so --requeue starts one")
            if engine == "trl":
                display.note("loading PyTorch, transformers and TRL (about 10 s)")
            if changed:
                display.note(changed)
            session = open_session(
                file, args.overrides, folder, display, engine=engine, command=command, resume=resume,
                start=not args.resume, **{name: getattr(args, name) for name in flags},
            )  # fmt: skip
            _engine(engine)(session)
    except (InputError, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        return _stopped(display, _reason(error, folder, go_on))
    return 0


@contextmanager
def _nothing_asked() -> Iterator[None]:
    """What a library asks on stdin all the same finds nobody there, and is refused."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


_NAMES = {"trl": "train", "verl": "verl"}


def _program() -> list[str]:
    """What starts this command: torchrun, where it did, with as many processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_WORLD_SIZE" not in os.environ:
        return ["bandpo"]
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    many = [] if nodes == "1" else ["--nnodes", nodes]
    return ["torchrun", *many, "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], "-m", "bandpo"]


def _engine(engine: str) -> Callable[[Session], Any]:
    """The backend's own course of a run; imported once the folder is there and owned."""
    if engine == "verl":
        from bandpo.lab.verl.run import run as run_verl

        return run_verl
    from bandpo.lab.trl.run import run as run_trl

    return run_trl


def default_out(name: str, resume: bool) -> Path:
    """Return the first of runs/NAME, runs/NAME-2, ... that is free, or with `resume` the last that holds a run."""
    from bandpo.lab.run.folder import RunFolder

    before = path = Path("runs") / name
    number = 1
    while "RANK" not in os.environ and RunFolder(path).occupied():  # torchrun's processes must agree on one folder
        number += 1
        before, path = path, Path("runs") / f"{name}-{number}"
    return before if resume else path


def _reason(error: Exception | KeyboardInterrupt, folder: RunFolder, go_on: str) -> str:
    """Why a run ended, and how to go on, in a line; an unforeseen error's traceback goes into the run's folder."""
    from bandpo.lab.run.session import Stopped

    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {go_on}"
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, Stopped):
        return f"{error}; {go_on if error.resumable else 'mend it, and start again with another --out'}"
    # Each library has its own error for a full disk.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if folder.path.is_dir() and (full or shutil.disk_usage(folder.path).free < ALMOST_NOTHING):
        return f"the disk is full ({error}); make room and {go_on}"
    if not folder.has_run():
        raise error
    log = folder.path / "error.txt"
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; the traceback is in {log}; {go_on}"


def _stopped(display: Display, message: str) -> int:
    from bandpo.lab.page import visible

    display.emit({"event": "failed", "message": message})
    print(visible(message), file=sys.stderr)
    return 1
