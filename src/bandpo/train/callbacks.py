"""What happens beside the training: metrics to the file and the screen, tokens kept for the report, evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerControl, TrainerState

    from bandpo.engines.trl import BandGRPOConfig
    from bandpo.train.display import Display
    from bandpo.train.folder import RunFolder

MAX_TOKENS = 20_000
RENAMED = {"clip/zero_grad": "clipped"}
LEFT_OUT = ("step_time",)  # "seconds" says more


class TokenSampler:
    """Keeps up to 20,000 of the tokens that were trained on, spread evenly over the run.

    How many tokens a micro-batch gives, and which, depends on its place in the run alone: a resumed run keeps the same
    ones, and the training's own random numbers are not touched.

    Args:
        kept: arrays of an earlier part of the run, or none.
    """

    def __init__(self, kept: dict[str, np.ndarray]) -> None:
        self._parts = [kept] if kept else []
        self._place = (-1, 0)

    def add(self, step: int, micro_steps: int, steps: int, tokens: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
        """Take this micro-batch's share.

        Args:
            step: optimiser step being made, from 1.
            micro_steps: micro-batches in a step.
            steps: optimiser steps in the run.
            tokens: logps, old_logps and advantages, shape (batch, token).
            mask: of real tokens, same shape.
        """
        micro = self._place[1] + 1 if self._place[0] == step else 0
        self._place = (step, micro)
        call, calls = (step - 1) * micro_steps + micro, steps * micro_steps
        share = MAX_TOKENS * (call + 1) // calls - MAX_TOKENS * call // calls
        if share == 0:
            return
        logps, old_logps, advantages = tokens
        moved = (mask.bool() & (logps != old_logps)).nonzero(as_tuple=True)  # elsewhere the ratio is 1
        order = torch.randperm(len(moved[0]), generator=torch.Generator().manual_seed(call))[:share].to(mask.device)
        rows, columns = moved[0][order], moved[1][order]
        named = {"old_logps": old_logps, "logps": logps, "advantages": advantages}
        part = {name: values[rows, columns].float().cpu().numpy() for name, values in named.items()}
        self._parts.append({**part, "step": np.full(len(order), step, dtype=np.int32)})

    def arrays(self) -> dict[str, np.ndarray]:
        """What was kept: old_logps, logps, advantages (float32) and step (int32)."""
        names = ("old_logps", "logps", "advantages", "step")
        kinds = (np.float32, np.float32, np.float32, np.int32)
        return {
            name: np.concatenate([np.empty(0, kind), *(part[name] for part in self._parts)])
            for name, kind in zip(names, kinds, strict=True)
        }


class Recorder(TrainerCallback):
    """Writes what the trainer logs to metrics.jsonl and shows it; evaluates along the way.

    Args:
        folder: the run's folder.
        display: where to show it.
        args: the run's configuration.
        arm: the arm's name with --compare; empty for the run itself.
        eval_every: optimiser steps between evaluations; 0 for none.
        evaluate: `evaluate(step)` evaluates, and writes and shows what it found.
    """

    def __init__(
        self,
        folder: RunFolder,
        display: Display,
        args: BandGRPOConfig,
        *,
        arm: str,
        eval_every: int,
        evaluate: Callable[[int], None],
    ) -> None:
        self.folder = folder
        self.display = display
        self.args = args
        self.arm = {"arm": arm} if arm else {}
        self.eval_every = eval_every
        self.evaluate = evaluate
        self.sampler = TokenSampler(folder.tokens())
        self.state: TrainerState | None = None
        records = folder.metrics()
        self._seconds_before = max((r.get("seconds", 0.0) for r in records), default=0.0)
        self._started, self._first = time.monotonic(), 0

    def rollouts(self, steps: int) -> int:
        """The number of rollouts in so many optimiser steps, the last perhaps in part."""
        micro = self.args.steps_per_generation * self.args.num_iterations
        return math.ceil(steps * self.args.gradient_accumulation_steps / micro)

    def tokens(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """The trainer's token_callback."""
        if self.state is not None:
            self.sampler.add(
                self.state.global_step + 1,
                self.args.gradient_accumulation_steps,
                self.state.max_steps,
                (logps, old_logps, advantages),
                mask,
            )

    def save_tokens(self) -> None:
        """Write tokens.npz."""
        self.folder.write_tokens(self.sampler.arrays())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when the training starts, and at which step."""
        self.state, self._started, self._first = state, time.monotonic(), state.global_step
        self.display.emit(
            {
                "event": "start",
                **self.arm,
                "task": self.folder.info()["task"],
                "model": self.folder.info()["model"],
                "clip": self.args.clip,
                "clip_args": self.args.clip_args,
                "steps": state.max_steps,
                "rollouts": self.rollouts(state.max_steps),
                "from_step": state.global_step,
                "out": str(self.folder.path),
            }
        )

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Record a log line of the training; the trainer's closing summary is not one."""
        if not logs or "loss" not in logs:
            return
        record = {"event": "step", "step": state.global_step, "rollout": self.rollouts(state.global_step)}
        spent = time.monotonic() - self._started
        record["seconds"] = round(self._seconds_before + spent, 3)
        for name, value in logs.items():
            if name not in LEFT_OUT and isinstance(value, (int, float)) and math.isfinite(value):
                record[RENAMED.get(name, name)] = value
        self.folder.add_metrics(record)
        left = spent / max(state.global_step - self._first, 1) * (state.max_steps - state.global_step)
        whole = {"steps": state.max_steps, "rollouts": self.rollouts(state.max_steps), "left": round(left, 1)}
        self.display.emit({**record, **self.arm, **whole})
        if self._is_due(state):
            self.evaluate(state.global_step)

    def _is_due(self, state: TrainerState) -> bool:
        return (
            bool(self.eval_every) and state.global_step % self.eval_every == 0 and state.global_step < state.max_steps
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate when it is time; save the tokens just before a checkpoint, so that none are missing from it."""
        if self._is_due(state) and not control.should_log:  # else once the step is logged
            self.evaluate(state.global_step)
        if control.should_save:
            self.save_tokens()
