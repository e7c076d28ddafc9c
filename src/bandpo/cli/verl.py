"""`bandpo verl`: train by a recipe with verl. Nothing heavy is imported before the recipe is checked."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from bandpo._input import InputError
from bandpo.cli import _run

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
that every node sees. verl wants an environment of its own: pip install ".[verl]" in a checkout.

examples:
  bandpo verl verl-demo
  bandpo verl verl-demo --max_steps 64 --out runs/short
  bandpo verl verl-demo --print
  bandpo verl my.yaml --clip_args.delta 0.02 actor_rollout_ref.rollout.gpu_memory_utilization=0.6 --out /shared/run1
  bandpo verl my.yaml --out /shared/run1 --resume
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = _run.add_parser(
        commands, "verl", _verl, "verl-demo, another name, or a YAML file",
        help="train by a recipe with verl, on several GPUs or nodes",
        description="Train a language model by a recipe with verl on Ray, from two processes on a CPU to many nodes,\n"
        "and leave the same folder and report as `bandpo train`.",
        usage="bandpo verl RECIPE [--key value ...] [key=value ...] [options]", epilog=EPILOG,
    )  # fmt: skip
    parser.add_argument("--print", action="store_true", help="print verl's command line and do nothing else")
    parser.add_argument("--prepare", action="store_true", help="write the data and print verl's command line")


def _verl(args: argparse.Namespace) -> int:
    if not (args.print or args.prepare):
        return _run.run(args, "verl")
    if args.resume or args.requeue:
        raise InputError("--resume: continues a run, which neither --print nor --prepare does; give one of them")
    from bandpo.lab.recipe import load
    from bandpo.lab.run.folder import RunFolder
    from bandpo.lab.verl.config import environment, schedule, to_verl
    from bandpo.lab.verl.run import is_plain, make_place, prepare

    file, _ = _run.read(args, "verl")
    recipe = load(file, args.overrides, backend="verl")
    schedule(recipe)
    out = (args.out or _run.default_out(file.name, False)).absolute()
    if args.print:
        plain = is_plain(recipe.make_task())
    else:
        with RunFolder(out).claimed():
            plain = prepare(recipe, out)
    place = make_place(recipe, out, plain=plain, make=False)
    variables = [f"{key}={shlex.quote(value)}" for key, value in environment(recipe, place).items()]
    words = [shlex.quote(word) for word in to_verl(recipe, place)]
    line = " \\\n  ".join([*variables, "python -m verl.trainer.main_ppo", *words])
    print(json.dumps({"data": str(out / "data"), "command": line}) if args.prepare and args.json else line)
    return 0
