"""What verl writes while it trains, as the records of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bandpo.engines._adapter import shares
from bandpo.lab.run import checkpoints
from bandpo.lab.run.records import Sample, Score, Step
from bandpo.lab.run.session import Session
from bandpo.lab.verl.config import Schedule

NAMES = {
    "critic/score/mean": "reward",
    "actor/entropy": "entropy",
    "actor/loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "response_length/mean": "completions/mean_length",
}
CLIP = "actor/clip/"  # what bandpo.engines.verl adds to the loss's metrics
KEPT_SAMPLES = 24


class OtherLossError(RuntimeError):
    """The workers train with another loss than bandpo's."""


class Collector:
    """Follows the files that verl writes, and hands what they say to the run.

    Args:
        session: the run.
        plan: its schedule.
        log: file of verl's metrics, one JSON object a line.
        start: rollouts made before this process.
        measured: whether the loss reports what the clip does, by which it is known to be bandpo's.
    """

    def __init__(self, session: Session, plan: Schedule, *, log: Path, start: int, measured: bool = True) -> None:
        self.session, self.plan, self.log, self.start, self.measured = session, plan, log, start, measured
        self.samples = session.recipe.eval_prompts * session.recipe.eval_samples
        self.rollout = start
        last = session.last_step()
        self.seconds = self._before = last.seconds if last else 0.0
        self._read = 0
        self._waiting: list[int] = []

    def poll(self, *, last: bool = False) -> None:
        """Take what is new; at the last, once verl has ended, nothing is awaited."""
        for entry in self._new_lines():
            step, data = int(entry["step"]), entry["data"]
            if "actor/pg_loss" in data:
                self._step(step, data)
            if any(key.startswith("val-") for key in data):
                self._waiting.append(step)
        # verl writes the samples of an evaluation in a thread of their own.
        ready = [step for step in self._waiting if last or self._complete(step)]
        self._waiting = [step for step in self._waiting if step not in ready]
        for step in ready:
            self._evaluation(step)
        self._seal()

    def _seal(self) -> None:
        """Seal the newest checkpoint, once verl itself calls it complete."""
        folder = self.session.folder.checkpoints
        written = folder / "latest_checkpointed_iteration.txt"
        number = written.read_text().strip() if written.exists() else ""
        newest = folder / f"global_step_{number}"
        if number.isdecimal() and newest.is_dir() and not (newest / checkpoints.SEAL).exists():
            checkpoints.seal(newest, self.session.fingerprint, int(number), checksum=False)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._read += len(line)
                yield json.loads(line)

    def _step(self, rollout: int, data: dict[str, Any]) -> None:
        if self.measured and f"{CLIP}tokens_sum" not in data:
            raise OtherLossError(
                f"rollout {rollout}: verl's workers report no metrics of bandpo's loss, so another loss trains; do "
                "they have bandpo installed, and does nothing set actor_rollout_ref.actor.policy_loss?"
            )
        self.rollout = rollout
        self.seconds += data.get("timing_s/step", 0.0) + data.get("timing_s/testing", 0.0)
        place = {"step": rollout * self.plan.updates, "rollout": rollout, "seconds": round(self.seconds, 3)}
        pace = (self.seconds - self._before) / max(rollout - self.start, 1)
        self.session.stepped(
            Step.model_validate(step_record(data) | place), steps=self.plan.rollouts * self.plan.updates,
            rollouts=self.plan.rollouts, left=pace * (self.plan.rollouts - rollout),
        )  # fmt: skip

    def _complete(self, rollout: int) -> bool:
        path = self._samples(rollout)
        return path.exists() and path.read_bytes().count(b"\n") >= self.samples

    def _samples(self, rollout: int) -> Path:
        return self.session.folder.path / "validation" / f"{rollout}.jsonl"

    def _evaluation(self, rollout: int) -> None:
        """Record an evaluation."""
        rows = read_samples(self._samples(rollout))
        if not rows:
            where, out = self._samples(rollout), self.session.folder.path
            self.session.display.note(
                f"verl left no samples in {where}; does {out} lie on storage that every node sees?"
            )
            return
        when = {0: "before", self.plan.rollouts: "after"}.get(rollout, "during")
        self.session.evaluated(rollout * self.plan.updates, evaluation(rows), when=when)

    def samples_before_and_after(self) -> list[Sample]:
        """One sample of each of the first problems, before and after; none where verl left no files."""
        before, after = (_first_samples(read_samples(self._samples(r))) for r in (0, self.plan.rollouts))
        return [
            Sample(
                prompt=prompt, answer=row["gts"], before=row["output"], correct_before=bool(row["acc"]),
                after=after[prompt]["output"], correct_after=bool(after[prompt]["acc"]),
            )
            for prompt, row in sorted(before.items())
            if prompt in after
        ][:KEPT_SAMPLES]  # fmt: skip


def step_record(data: dict[str, Any]) -> dict[str, float]:
    """Return verl's metrics of one rollout under the names of `bandpo train` where it has them.

    The clip's shares, ``clip/NAME``, are sums over tokens divided by each other. verl averages the sums over
    micro-batches, so every token of the rollout counts once where all updates have equally many of them;
    ``use_dynamic_bsz`` does not promise that, and the tokens of an update with fewer micro-batches then weigh more.
    """
    found = {NAMES.get(key, key): value for key, value in data.items() if not key.startswith((CLIP, "val-"))}
    sums = {key.removeprefix(CLIP): float(value) for key, value in data.items() if key.startswith(CLIP)}
    if sums:
        found |= {f"clip/{name}": value for name, value in shares(sums).items()}
        found["clipped"] = found["clip/zero_grad"]
    return {key: value for key, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the completions of one of verl's evaluations: input, output, gts, acc and uid; none without a file."""
    if not path.exists():
        return []
    whole = path.read_text("utf-8", errors="replace").split("\n")[:-1]  # a line without its end is still being written
    return [json.loads(line) for line in whole if line]


def evaluation(rows: list[dict[str, Any]]) -> Score:
    """Return the accuracy of samples and its 95 % interval, which knows that those of one prompt hang together."""
    from bandpo.lab.evaluate import accuracy_interval

    prompts: dict[str, list[float]] = {}
    for row in rows:  # uid: the prompt's, the sample's number, the turn's
        prompts.setdefault(str(row["uid"]).rsplit("_", 2)[0], []).append(float(row["acc"]))
    most = max(map(len, prompts.values()))
    whole = np.array([values for values in prompts.values() if len(values) == most])  # a failed request leaves fewer
    low, high = accuracy_interval(whole)
    return Score(accuracy=float(whole.mean()), low=low, high=high, n=int(whole.size))


def _first_samples(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row.get("question") or row["input"], row)
    return found
