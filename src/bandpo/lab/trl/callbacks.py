"""What happens beside the training: metrics to the file and the screen, tokens kept for the report, evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from bandpo.lab.run import checkpoints
from bandpo.lab.run.records import TOKENS, Step

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerControl, TrainerState

    from bandpo.engines.trl import BandGRPOConfig
    from bandpo.lab.run.session import Session

MAX_TOKENS = 20_000
RENAMED = {"clip/zero_grad": "clipped"}
LEFT_OUT = ("step_time",)  # "seconds" says more


class TokenSampler:
    """Keeps up to 20,000 of the tokens that were trained on, spread evenly over the run.

    Those whose ratio has left 1, or, as long as there is none, others: they say that the clip is idle.
    How many tokens a micro-batch gives, and which, depends on its place in the run alone: a resumed run keeps the same
    ones, and the training's own random numbers are not touched.

    Args:
        kept: arrays of an earlier part of the run, or none.
    """

    def __init__(self, kept: dict[str, np.ndarray]) -> None:
        parts = [kept] if kept else []
        still = all(np.array_equal(part["logps"], part["old_logps"]) for part in parts)
        self._moved, self._still = ([], parts) if still else (parts, [])
        self._place = (-1, 0)

    def thin(self, step: int, steps: int) -> None:
        """Keep as many of an earlier part's tokens as its share of the run allows, should that have become longer."""
        most = MAX_TOKENS * step // max(steps, 1)
        for part in (*self._moved, *self._still):
            if (there := len(part["step"])) > most:
                chosen = np.arange(most) * there // max(most, 1)
                part.update({name: values[chosen] for name, values in part.items()})

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
        chosen = (mask.bool() & (logps != old_logps)).nonzero(as_tuple=True)  # elsewhere the ratio is 1
        parts = self._moved
        if len(chosen[0]) == 0 and not parts:
            chosen, parts = mask.bool().nonzero(as_tuple=True), self._still
        if len(chosen[0]) == 0:
            return
        order = torch.randperm(len(chosen[0]), generator=torch.Generator().manual_seed(call))[:share].to(mask.device)
        rows, columns = chosen[0][order], chosen[1][order]
        named = {"old_logps": old_logps, "logps": logps, "advantages": advantages}
        part = {name: values[rows, columns].float().cpu().numpy() for name, values in named.items()}
        parts.append({**part, "step": np.full(len(order), step, dtype=np.int32)})

    def arrays(self) -> dict[str, np.ndarray]:
        """What was kept: old_logps, logps, advantages (float32) and step (int32)."""
        return {
            name: np.concatenate([np.empty(0, kind), *(part[name] for part in self._moved or self._still)])
            for name, kind in TOKENS.items()
        }


class Recorder(TrainerCallback):
    """Records and shows what the trainer logs; evaluates along the way.

    Args:
        session: the run.
        args: the run's configuration.
        evaluate: `evaluate(step)` evaluates, and records and shows what it found.
    """

    def __init__(self, session: Session, args: BandGRPOConfig, *, evaluate: Callable[[int], None]) -> None:
        self.session, self.args, self.evaluate = session, args, evaluate
        self.every = session.recipe.eval_every
        self.sampler = TokenSampler(session.folder.tokens())
        self.state: TrainerState | None = None
        last = session.last_step()
        self._seconds_before = last.seconds if last else 0.0
        self._started, self._first = time.monotonic(), 0

    def rollouts(self, steps: int) -> int:
        """Return the number of rollouts in so many optimiser steps, the last perhaps in part."""
        micro = self.args.steps_per_generation * self.args.num_iterations
        return math.ceil(steps * self.args.gradient_accumulation_steps / micro)

    def tokens(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """The trainer's token_callback."""
        if self.state is not None:
            step, accumulate = self.state.global_step + 1, self.args.gradient_accumulation_steps
            self.sampler.add(step, accumulate, self.state.max_steps, (logps, old_logps, advantages), mask)

    def save_tokens(self) -> None:
        """Write tokens.npz."""
        self.session.folder.write_tokens(self.sampler.arrays())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when the training starts, and at which step."""
        self.state, self._started, self._first = state, time.monotonic(), state.global_step
        self.sampler.thin(state.global_step, state.max_steps)
        whole = {"steps": state.max_steps, "rollouts": self.rollouts(state.max_steps)}
        self.session.started(**whole, from_step=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Record a log line of the training; the trainer's closing summary is not one."""
        if not logs or "loss" not in logs:
            return
        spent, step = time.monotonic() - self._started, state.global_step
        found = {
            RENAMED.get(name, name): value
            for name, value in logs.items()
            if name not in LEFT_OUT and isinstance(value, (int, float)) and math.isfinite(value)
        }
        record = Step(
            **found | {"step": step, "rollout": self.rollouts(step), "seconds": round(self._seconds_before + spent, 3)}
        )
        left = spent / max(step - self._first, 1) * (state.max_steps - step)
        self.session.stepped(record, steps=state.max_steps, rollouts=self.rollouts(state.max_steps), left=left)
        if self._is_due(state):
            self.evaluate(step)

    def _is_due(self, state: TrainerState) -> bool:
        return bool(self.every) and state.global_step % self.every == 0 and state.global_step < state.max_steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate when it is time; save the tokens just before a checkpoint, so that none are missing from it."""
        if self._is_due(state) and not control.should_log:  # else once the step is logged
            self.evaluate(state.global_step)
        if control.should_save:
            self.save_tokens()


class Sealer(TrainerCallback):
    """Seals each checkpoint once every process has written its part, and keeps the trainer's own log from growing."""

    def __init__(self, run: str, main: bool) -> None:
        self.run, self.main = run, main

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget all log lines but the last: metrics.jsonl has them, and each checkpoint would hold them all again."""
        del state.log_history[:-1]

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the seal."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.main:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.run, state.global_step)
