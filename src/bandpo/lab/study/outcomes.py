"""What is measured of a run: one number from its curves and its evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bandpo.lab.study.records import RunRecord

LATE_ROLLOUTS, LATE_EVALS = 10, 3


@dataclass(frozen=True)
class Outcome:
    """Something that is measured.

    Args:
        title: what a reader calls it.
        means: what it is, in a sentence.
        of: takes a run's record and the study's `found_above`; NaN where the run does not say, and for a run that did
            not get to its end, whose curves are no whole ones.
        better: 1 where more is better, 0 where it is neither.
    """

    title: str
    means: str
    of: Callable[[RunRecord, float | None], float]
    better: int = 1


def mean(values: Sequence[float | None]) -> float:
    """The mean of the finite ones; NaN where there are none."""
    there = [x for x in values if x is not None and math.isfinite(x)]
    return sum(there) / len(there) if there else math.nan


def _curve(name: str, last: int = 0) -> Callable[[RunRecord, float | None], float]:
    return lambda run, _: mean(run.curves.get(name, [])[-last:]) if run.status == "done" else math.nan


def _after(name: str, last: int = 1) -> Callable[[RunRecord, float | None], float]:
    """An evaluation's number at the end, or its mean over the last few, that before training left out."""

    def of(run: RunRecord, _: float | None) -> float:
        evals: list[Mapping[str, Any]] = [e for e in run.evals if (e["step"] or 0) > 0]
        return mean([e.get(name) for e in evals[-last:]]) if run.status == "done" else math.nan

    return of


def _found(run: RunRecord, above: float | None) -> float:
    rewards = [x for x in run.curves.get("reward", []) if x is not None]
    return math.nan if above is None or not rewards or run.status != "done" else float(max(rewards) > above)


LATE = f"mean of the last {LATE_EVALS} evaluations"
OUTCOMES: dict[str, Outcome] = {
    "auc_reward": Outcome("Training reward, mean", "area under the training reward, per rollout", _curve("reward")),
    "last_reward": Outcome(
        "Training reward, late", f"mean of the last {LATE_ROLLOUTS} rollouts", _curve("reward", LATE_ROLLOUTS)
    ),
    "accuracy": Outcome("Held-out accuracy", "mean score of the last evaluation", _after("accuracy")),
    "late_accuracy": Outcome("Held-out accuracy, late", LATE, _after("accuracy", LATE_EVALS)),
    "pass_at_k": Outcome("Held-out pass@k", "k is eval_samples; the last evaluation", _after("pass_at_k")),
    "late_pass_at_k": Outcome("Held-out pass@k, late", LATE, _after("pass_at_k", LATE_EVALS)),
    "entropy": Outcome(
        "Entropy", "of the next token on held-out problems, nats; the last evaluation", _after("entropy"), 0
    ),
    "last_entropy": Outcome(
        "Training entropy, late",
        f"nats, mean of the last {LATE_ROLLOUTS} rollouts",
        _curve("entropy", LATE_ROLLOUTS),
        0,
    ),
    "auc_entropy": Outcome("Training entropy, mean", "nats, mean over rollouts", _curve("entropy"), 0),
    "gradient_kept": Outcome(
        "Gradient kept", "sum of |c| over sum of |r A|, mean over updates", _curve("gradient_kept"), 0
    ),
    "clipped": Outcome("Tokens without gradient", "share, mean over updates", _curve("clipped"), 0),
    "kl": Outcome("Divergence reached", "binary KL of tokens, nats, mean over updates", _curve("kl"), 0),
    "length": Outcome("Answer length", "tokens, the last evaluation", _after("length"), 0),
    "found": Outcome("Found", "whether the training reward got above found_above in some rollout", _found),
}
