"""`bandpo train`: the command line. Nothing heavy is imported before the first line is on the screen."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError

if TYPE_CHECKING:
    from bandpo.train.display import Display
    from bandpo.train.recipe import RecipeFile

SMOKE = ["--max_steps=2", "--eval_prompts=4", "--eval_samples=1", "--eval_every=0"]
ALMOST_NOTHING = 1_000_000  # bytes
EPILOG = """\
A recipe is a YAML file; its keys are the fields of TRL's GRPOConfig, and

  task, task_args       what is asked, and how an answer is checked
  model                 what is trained: bandpo/tiny-addition, smollm2-135m-instruct, a folder, a Hub name
  clip, clip_args       band, fixed, clip-higher or none, and its arguments
  eval_prompts, eval_samples, eval_every
                        held-out evaluation: prompts, completions of each, optimiser steps between two (0: only
                        before and after)
  threads               CPU threads of PyTorch (0: its own choice)
  use_peft, lora_r, ... TRL's LoRA fields

Every key can be given on the command line; it wins over the recipe. A GPU is taken where there is one, unless the
recipe says use_cpu, as demo does: its model is too small to gain from one. With several GPUs or machines:
torchrun --nproc_per_node N -m bandpo train ...

examples:
  bandpo train demo
  bandpo train demo --learning_rate 5e-4 --clip_args.delta 0.02 --out runs/wider --compare
  bandpo train demo --clip fixed --clip_args.eps_high 0.28 --out runs/fixed
  bandpo train runs/wider/recipe.yaml --seed 1 --out runs/seed1
  bandpo train demo --out runs/wider --resume
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `train` command.

    The keys of a recipe are not arguments of this parser: parse with `parse_known_args`, abbreviating nothing, and put
    what it leaves over into `overrides` of the namespace.

    Args:
        subparsers: from `ArgumentParser.add_subparsers`.

    Returns:
        The command's parser; its namespace has `handler`, a function of the namespace that returns the exit code.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a language model by a recipe",
        description="Train a language model by a recipe: evaluate on held-out problems, train by reinforcement\n"
        "learning with TRL, evaluate again, write a report.",
        usage="bandpo train RECIPE [--key value ...] [options]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="demo, smollm2, or a YAML file")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run's folder (default: the first free one of runs/RECIPE, runs/RECIPE-2, ...)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run in --out")
    parser.add_argument("--compare", action="store_true", help="train without a clip and with the fixed one as well")
    parser.add_argument("--warmup", action="store_true", help="make the tiny model's warm-up checkpoint first")
    parser.add_argument("--smoke", action="store_true", help="two optimiser steps: does everything fit together?")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout; the last is the result")
    parser.set_defaults(handler=train, overrides=[])
    return parser


def train(args: argparse.Namespace) -> int:
    """Run `bandpo train`.

    Args:
        args: the namespace of `add_parser`'s parser, `overrides` holding what it left over.

    Returns:
        Exit code: 0 done, 1 stopped or interrupted.

    Raises:
        InputError: the command line, the recipe or the folder cannot be used.
    """
    # The command promises to need no network; this is the one thing in it that would use it unasked.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from bandpo.train.recipe import read_recipe

    overrides = [*(SMOKE if args.smoke else []), *args.overrides]
    recipe = read_recipe(args.recipe)
    out = args.out or _default_out(f"{recipe.name}{'-smoke' if args.smoke else ''}", args.resume)
    display = _display(args.json)
    go_on = f"go on with: {_command(args, args.overrides, out)} --resume"
    try:
        return _train(args, recipe, overrides, out, display)
    except KeyboardInterrupt:
        return _stopped(display, f"interrupted; {go_on}", 1)
    except FloatingPointError as error:
        return _stopped(display, str(error), 1)
    except InputError:
        raise
    except Exception as error:
        # Each library has its own error for a full disk.
        if not out.is_dir() or shutil.disk_usage(out).free > ALMOST_NOTHING:
            raise
        return _stopped(display, f"the disk is full ({error}); make room and {go_on}", 1)


def _default_out(name: str, resume: bool) -> Path:
    """The first of runs/NAME, runs/NAME-2, ... that holds no run, or with `resume` the last that holds one."""
    from bandpo.train.folder import RunFolder

    before = path = Path("runs") / name
    number = 1
    while "RANK" not in os.environ and RunFolder(path).holds_run():  # torchrun's processes must agree on one folder
        number += 1
        before, path = path, Path("runs") / f"{name}-{number}"
    return before if resume else path


def _train(args: argparse.Namespace, file: RecipeFile, overrides: list[str], out: Path, display: Display) -> int:
    from bandpo.train.folder import RunFolder, check_folder
    from bandpo.train.recipe import resolve

    main = os.environ.get("RANK", "0") == "0"  # torchrun's name for it; the other processes neither print nor write
    if main:
        check_folder(out, resume=args.resume)
    info = RunFolder(out).info() if args.resume else {}
    if main:
        if args.resume and not info:
            display.note(f"{out}: no run there yet, so --resume starts one")
        display.note("loading PyTorch, transformers and TRL (about 10 s)")
    if args.warmup and not info.get("warmup", True):
        raise InputError(f"--warmup: the run in {out} was started without it; leave it out, or name another folder")
    command = info.get("command") or _command(args, args.overrides, out)
    # A run is resumed with the keys it was started with; those given now are checked against it.
    recipe = resolve(file, [*info.get("overrides", []), *overrides])

    from bandpo.train.run import run

    compare, warmup = (getattr(args, flag) or info.get(flag, False) for flag in ("compare", "warmup"))
    run(recipe, out=out, resume=args.resume, compare=compare, warmup=warmup, command=command, display=display)
    return 0


def _display(as_json: bool) -> Display:
    from bandpo.train.display import Display, HumanDisplay, JsonDisplay

    if os.environ.get("RANK", "0") != "0":
        return Display()
    return JsonDisplay() if as_json else HumanDisplay()


def _stopped(display: Display, message: str, code: int) -> int:
    display.emit({"event": "failed", "message": message})
    print(message, file=sys.stderr)
    return code


def _command(args: argparse.Namespace, overrides: Sequence[str], out: Path) -> str:
    """The command to repeat the run."""
    flags = [f"--{name}" for name in ("compare", "warmup", "smoke") if getattr(args, name)]
    return shlex.join(["bandpo", "train", args.recipe, *overrides, *flags, "--out", str(out)])
