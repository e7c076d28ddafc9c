"""`bandpo verl`: the command line. Nothing heavy is imported before the recipe is checked."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError

if TYPE_CHECKING:
    from bandpo.verl.recipe import VerlRecipe

EPILOG = """\
RECIPE is one of `bandpo train`: a name (verl-demo, demo, smollm2) or a YAML file, with the same keys. They are
translated; a key that verl has no counterpart for is an error. Two ways to change one on the command line:

  --key value           a key of the recipe: --max_steps 64, --clip_args.delta 0.02
  key=value             a key of verl's own, in hydra's grammar: actor_rollout_ref.rollout.name=sglang, +x.y=1

A mapping `verl:` in the recipe holds

  workers, nodes        processes that train on each node, and nodes (1 and 1); per_device_train_batch_size is for one
  ray_address           a Ray cluster that is up: auto, host:6379, ray://host:10001 (none: Ray starts here)
  any other key         verl's own, nested or with dots

use_cpu: true needs no GPU and no engine: the weights are sharded over gloo and transformers generates. Without it verl
generates with vLLM, or with SGLang where actor_rollout_ref.rollout.name says so. On a cluster DIR must lie on storage
that every node sees. verl wants an environment of its own: pip install "bandpo[verl]".

examples:
  bandpo verl verl-demo
  bandpo verl verl-demo --max_steps 64 --out runs/short
  bandpo verl verl-demo --print
  bandpo verl my.yaml --clip_args.delta 0.02 actor_rollout_ref.rollout.gpu_memory_utilization=0.6 --out /shared/run1
  bandpo verl my.yaml --out /shared/run1 --resume
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `verl` command; what its parser leaves over goes into `overrides`, as with `bandpo train`.

    Args:
        subparsers: from `ArgumentParser.add_subparsers`.

    Returns:
        The command's parser; its namespace has `handler`, a function of the namespace that returns the exit code.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verl",
        help="train by a recipe with verl, on several GPUs or nodes",
        description="Train a language model by a recipe with verl on Ray, from two processes on a CPU to many nodes,\n"
        "and leave the same folder and report as `bandpo train`.",
        usage="bandpo verl RECIPE [--key value ...] [key=value ...] [options]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="verl-demo, another name, or a YAML file")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run's folder (default: the first free one of runs/RECIPE, runs/RECIPE-2, ...)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run in --out")
    parser.add_argument("--print", action="store_true", help="print verl's command line and do nothing else")
    parser.add_argument("--prepare", action="store_true", help="write the data and print verl's command line")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout; the last is the result")
    parser.set_defaults(handler=verl, overrides=[])
    return parser


def verl(args: argparse.Namespace) -> int:
    """Run `bandpo verl`.

    Args:
        args: the namespace of `add_parser`'s parser, `overrides` holding what it left over.

    Returns:
        Exit code: 0 done, 1 stopped or interrupted.

    Raises:
        InputError: the command line, the recipe, the folder or the installation cannot be used.
    """
    from bandpo.train.command import _default_out
    from bandpo.train.folder import RunFolder, check_folder
    from bandpo.train.recipe import read_recipe
    from bandpo.verl.recipe import check_recipe

    if args.resume and (args.print or args.prepare):
        raise InputError("--resume: continues a run, which neither --print nor --prepare does; give one of them")
    file = read_recipe(args.recipe)
    out = (args.out or _default_out(file.name, args.resume)).absolute()
    info = RunFolder(out).info() if args.resume else {}
    # A run is resumed with the keys it was started with; those given now are checked against it.
    recipe = check_recipe(file, [*info.get("overrides", []), *args.overrides])
    if args.print:
        print(_command_line(recipe, out))
        return 0
    check_folder(out, resume=args.resume)
    if args.prepare:
        return _prepare(recipe, out, args.json)
    command = shlex.join(["bandpo", "verl", args.recipe, *args.overrides, "--out", str(args.out or out)])
    return _run(recipe, out, args, info.get("command") or command)


def _prepare(recipe: VerlRecipe, out: Path, as_json: bool) -> int:
    """Write what the command line needs, and print it."""
    import json

    from bandpo.verl.data import make_task, write_data

    task, _ = make_task(recipe)
    write_data(task, out / "data", seed=recipe.get("seed") or 0, eval_prompts=recipe.get("eval_prompts"))
    line = _command_line(recipe, out)
    print(json.dumps({"data": str(out / "data"), "command": line}) if as_json else line)
    return 0


def _command_line(recipe: VerlRecipe, out: Path) -> str:
    """The command line of verl as a shell takes it, a word a line."""
    from bandpo.verl.data import make_task
    from bandpo.verl.run import make_place
    from bandpo.verl.translate import environment, overrides

    place = make_place(recipe, out, plain=make_task(recipe)[1], make=False)
    variables = [f"{key}={shlex.quote(value)}" for key, value in environment(recipe, place).items()]
    words = [shlex.quote(word) for word in overrides(recipe, place)]
    return " \\\n  ".join([*variables, "python -m verl.trainer.main_ppo", *words])


def _run(recipe: VerlRecipe, out: Path, args: argparse.Namespace, command: str) -> int:
    from bandpo.train.command import _display, _stopped
    from bandpo.verl.run import Stopped, run

    display = _display(args.json)
    try:
        run(recipe, out=out, resume=args.resume, command=command, display=display)
    except KeyboardInterrupt:
        return _stopped(display, f"interrupted; go on with: {command} --resume", 1)
    except Stopped as error:
        way_out = (
            f"go on with: {command} --resume" if error.resumable else "mend it, and start again with another --out"
        )
        return _stopped(display, f"{error}; {way_out}", 1)
    return 0
