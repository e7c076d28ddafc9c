"""`bandpo train`: train a language model by a recipe. Nothing heavy is imported before the first line is shown."""

from __future__ import annotations

import argparse
from typing import Any

from bandpo._input import InputError
from bandpo.cli import _run, study

EPILOG = """\
A recipe is a YAML file; its keys have the names of TRL's GRPOConfig, and beside them there are

  task, task_args       what is asked, and how an answer is graded
  model                 what is trained: bandpo/tiny-addition, smollm2-135m-instruct, a folder, a Hub name
  clip, clip_args       any clip (band, fixed, clip_higher, none, sapo, ...), and its arguments
  eval_prompts, eval_samples, eval_every
                        held-out evaluation: prompts, completions of each, optimiser steps between two (0: only
                        before and after)
  threads               CPU threads of PyTorch (0: its own choice)
  use_peft, lora_r, ... TRL's LoRA fields
  trl, verl             what is one backend's alone: trl.min_p, verl.workers
  smoke                 sizes for --smoke: another model, fewer problems; two optimiser steps where it says no more

Every key can be given on the command line; it wins over the recipe. A GPU is taken where there is one, unless the
recipe says use_cpu, as demo does: its model is too small to gain from one. With several GPUs or machines:
torchrun --nproc_per_node N -m bandpo train ...

examples:
  bandpo train demo
  bandpo train demo --learning_rate 5e-4 --clip_args.delta 0.02 --out runs/narrower --compare
  bandpo train demo --clip fixed --clip_args.eps_high 0.28 --out runs/fixed
  bandpo train runs/narrower/recipe.yaml --seed 1 --out runs/seed1
  bandpo train demo --out runs/narrower --resume
  bandpo train demo --out runs/fixed --resume --max_steps 2560
  bandpo train demo --seeds 0 1 2 --compare none,fixed,band --out runs/study
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = _run.add_parser(
        commands, "train", _train, "demo, smollm2, or a YAML file", help="train a language model by a recipe",
        description="Train a language model by a recipe: evaluate on held-out problems, train by reinforcement\n"
        "learning with TRL, evaluate again, write a report.",
        usage="bandpo train RECIPE [--key value ...] [options]", epilog=EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "--compare",
        nargs="?",
        const=True,
        default=False,
        metavar="CLIPS",
        help="train without a clip and with the fixed one as well; with --seeds, the clips: none,fixed,band",
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="SEED", help="a study: every clip with each of these seeds, as in 0 1 2 or 0-9"
    )
    parser.add_argument("--warmup", action="store_true", help="make the tiny model's warm-up checkpoint first")


def _train(args: argparse.Namespace) -> int:
    if args.seeds:
        for flag in ("resume", "requeue", "smoke", "warmup"):
            if getattr(args, flag):
                raise InputError(f"--{flag} with --seeds: is for one run, and a study goes on by itself; leave it out")
        return study.short_form(args)
    if isinstance(args.compare, str):
        raise InputError(
            f"--compare {args.compare}: clips are for several seeds, as in --seeds 0 1 2 --compare none,fixed,band; "
            "without --seeds give --compare alone, after the recipe"
        )
    return _run.run(args, "trl", flags=("compare", "warmup"))
