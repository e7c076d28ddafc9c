"""Stale rollouts: each is trained on a given number of rollouts after it was made, as in asynchronous training."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch

from bandpo._input import InputError
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.lab.trl.rows import RowsOnce

FILE = "rollouts-rank{}.pt"  # beside the optimizer's state in a checkpoint


class StaleGRPOTrainer(RowsOnce, BandGRPOTrainer):
    """TRL's trainer on rollouts of an older policy.

    The rollout of turn t was made by the policy of turn max(0, t - staleness), and its log-probabilities then are the
    ratio's denominators. At the first turn `staleness` rollouts more are made, of prompts drawn from the training data.
    Rewards are logged when a rollout is made.

    Args:
        *rest: as `BandGRPOTrainer`.
        staleness: rollouts between making and training, >= 0.
        **named: as `BandGRPOTrainer`.

    Raises:
        InputError: a schedule in which TRL computes no log-probabilities when it generates, or groups that are split
            over processes.
    """

    def __init__(self, *rest: Any, staleness: int, **named: Any) -> None:
        super().__init__(*rest, **named)
        self.staleness = staleness
        self._rollouts: deque[dict[str, Any]] = deque()
        check_schedule(self.args, staleness)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not self.staleness or not self.model.training:
            return made
        first = not self._rollouts
        self._rollouts.append(made)
        if first:
            self._fill(inputs)
        return self._rollouts.popleft()

    def _fill(self, inputs: list[dict[str, Any]]) -> None:
        """Make the rollouts that the first turns train on; what TRL logs of them is dropped."""
        seed = self.args.seed + self.accelerator.process_index
        turns = torch.Generator().manual_seed(seed)
        kept = {name: list(values) for name, values in self._metrics["train"].items()}
        for _ in range(self.staleness):
            count = len(inputs) // self.num_generations
            chosen = torch.randint(len(self.train_dataset), (count,), generator=turns).tolist()
            batch = [self.train_dataset[i] for i in chosen for _ in range(self.num_generations)]
            self._rollouts.append(super()._generate_and_score_completions(batch))
        self._metrics["train"].clear()
        self._metrics["train"].update(kept)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.staleness:
            torch.save(list(self._rollouts), Path(output_dir) / FILE.format(self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.staleness and checkpoint is not None:
            self._rollouts = deque(self._read(Path(checkpoint)))

    def _read(self, checkpoint: Path) -> list[dict[str, Any]]:
        path = checkpoint / FILE.format(self.accelerator.process_index)
        if not path.is_file():
            raise InputError(
                f"{path}: not there, so this checkpoint was not made with staleness={self.staleness}; start again with "
                "another output folder"
            )
        found: list[dict[str, Any]] = torch.load(path, map_location=self.args.device, weights_only=True)
        if len(found) != self.staleness:
            raise InputError(f"{path}: holds {len(found)} rollouts, but staleness={self.staleness}; give the first")
        return found


def check_schedule(args: BandGRPOConfig, staleness: int) -> None:
    """Check that rollouts can be so stale.

    Args:
        args: TRL's configuration.
        staleness: rollouts between making and training.

    Raises:
        InputError: a schedule in which TRL computes no log-probabilities when it generates, or groups that are split
            over processes.
    """
    if not staleness:
        return
    per_rollout = args.steps_per_generation * args.num_iterations
    if args.gradient_accumulation_steps % per_rollout == 0 and not args.use_vllm:
        raise InputError(
            f"staleness={staleness} with gradient_accumulation_steps={args.gradient_accumulation_steps}: each rollout "
            "would feed one update, for which TRL keeps no old log-probabilities; give several updates a rollout, such "
            f"as steps_per_generation={2 * args.gradient_accumulation_steps}"
        )
    if args.generation_batch_size // args.world_size % args.num_generations:
        raise InputError(
            f"staleness={staleness} with num_generations={args.num_generations}: a process generates "
            f"{args.generation_batch_size // args.world_size} completions: must be whole groups; change either"
        )
