"""A whole step of torchrl's PPO under our clips against the same step with torchrl's own clip, taken in turn.

Rollout (8 CartPoles), GAE, 4 epochs of minibatches with loss, backward, clipping and optimizer are all in the time.
Target for the band, which goes as bounds: <= 1.02. sapo goes as advantages c / r. The last rows of each size are the
loss alone, where the roots of the band show.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchrl
from common import ratios, write
from torchrl.objectives import ClipPPOLoss

from bandpo.engines.torchrl import BandClipPPOLoss

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engines"))
from torchrl_support import PPO  # noqa: E402

# units in the hidden layer, steps of each of the 8 environments, actions in a minibatch; 64 units is the worst case
CLIPS = ("band", "sapo")
SIZES = {"tiny": {"width": 64, "steps": 128, "batch": 256}, "small": {"width": 1024, "steps": 512, "batch": 1024}}


def in_turn(sides: dict[str, Callable[[], object]], rounds: int, warm: int) -> dict[str, list[tuple[float, float]]]:
    """Processor and wall time of each call; who goes first changes from round to round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(rounds + warm):
        for name in list(sides) if i % 2 else list(sides)[::-1]:
            start = time.process_time(), time.perf_counter()
            sides[name]()
            if i >= warm:
                times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return times


def row(what: str, clip: str, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    out: dict[str, Any] = {"what": what, "clip": clip, "torchrl": torchrl.__version__, "rounds": len(times["own"])}
    for i, clock in enumerate(("processor", "wall")):
        own, ours = ([x[i] for x in times[side]] for side in ("own", clip))
        out[f"{clock}_torchrl_seconds"] = statistics.median(own)
        out |= {f"{clock}_ratio_{name}": value for name, value in ratios(own, ours).items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name, size in SIZES.items():
        runs = {"own": PPO(ClipPPOLoss, **size)} | {clip: PPO(BandClipPPOLoss, clip=clip, **size) for clip in CLIPS}
        step = in_turn({key: run.iterate for key, run in runs.items()}, args.rounds, warm=3)
        loss = in_turn({key: alone(run) for key, run in runs.items()}, 5 * args.rounds, warm=20)
        updates = runs["own"].epochs * 8 * size["steps"] // size["batch"]
        for what, times in ((f"rollout, {updates} updates", step), ("loss and backward alone", loss)):
            rows += [row(f"{name}: {what}", clip, times) | size for clip in CLIPS]
        for run in runs.values():
            run.close()
    write("torchrl_step", rows)


def alone(run: PPO) -> Callable[[], None]:
    minibatch = next(run.data).reshape(-1)[: run.batch]
    minibatch["advantage"], minibatch["value_target"] = torch.randn(run.batch, 1), torch.ones(run.batch, 1)

    def loss() -> None:
        out = run.loss(minibatch)
        sum(out[key] for key in ("loss_objective", "loss_critic", "loss_entropy")).backward()

    return loss


if __name__ == "__main__":
    main()
