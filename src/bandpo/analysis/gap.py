"""The gap between the engine that sampled and the trainer: the same weights, two programs, other probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bandpo.loss.stats import BUCKETS, EDGES
from bandpo.operator.tokens import MOST_LOG_RATIO

FIELDS = ("tokens", "k3", "beyond", "weight", "weight_squared")
TWICE = math.log(2.0)


class Gap:
    """Sums over tokens of w = old / rollout, by bucket of old probability, and over sequences of their product."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(BUCKETS), len(FIELDS), dtype=torch.float64, device="cpu")
        self.sequences = torch.zeros(3, dtype=torch.float64, device="cpu")  # how many, sum of V and of V^2
        self.top = -math.inf
        self.largest, self.equal = 0.0, 0.0

    def add(self, old_logps: Tensor, rollout_logps: Tensor, mask: Tensor) -> None:
        """Count tokens; 2-d ones by sequence too.

        Args:
            old_logps: of the trainer's old policy.
            rollout_logps: of the engine that sampled.
            mask: bool; both of its shape, anything in padding.
        """
        log_w = torch.where(mask, old_logps.double() - rollout_logps.double(), 0.0)
        bucket = sum((old_logps > math.log(edge)).long() for edge in EDGES)
        assert isinstance(bucket, Tensor)
        apart = log_w[mask]
        d = apart.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
        w = torch.exp(d)
        rows = torch.stack([torch.ones_like(d), torch.expm1(d) - d, (d.abs() > TWICE).double(), w, w * w], -1)
        self.sums.index_add_(0, bucket[mask], rows)
        self.largest = max(self.largest, float(apart.abs().max()) if d.numel() else 0.0)
        self.equal += float((d == 0).sum())
        if mask.dim() > 1:
            self._add_sequences(log_w.sum(-1)[mask.any(-1)])

    def _add_sequences(self, log_w: Tensor) -> None:
        """Count W = V e^top, top the largest log W so far: products over long sequences leave every float's range."""
        before, self.top = self.top, max(self.top, float(log_w.max()) if log_w.numel() else -math.inf)
        v = torch.exp(log_w - self.top)
        found = torch.stack([torch.ones_like(v), v, v * v], -1).sum(0)
        if math.isfinite(before):
            shrink = math.exp(before - self.top)
            found += self.sequences * torch.tensor([1.0, shrink, shrink * shrink], dtype=torch.float64)
        self.sequences = found

    def as_dict(self) -> dict[str, Any]:
        """Return the shares.

        Returns:
            tokens; k3 (mean of w - 1 - log w, an estimate of KL(rollout || old) in nats); beyond_2x (share of tokens
            with w > 2 or w < 1/2); effective_sample_size ((sum w)^2 / (n sum w^2), 1 for no gap); largest_log_ratio;
            equal (share of tokens with w = 1 exactly); sequence_effective_sample_size, of the products over sequences,
            or None; by_bucket, a list of the first four.
        """
        n, weight, squared = (float(x) for x in self.sequences)
        return {
            **_row(self.sums.sum(0)),
            "largest_log_ratio": self.largest,
            "equal": self.equal / max(float(self.sums[:, 0].sum()), 1.0),
            "sequence_effective_sample_size": weight * weight / (n * squared) if n else None,
            "by_bucket": [
                {"bucket": name, **_row(row)} for name, row in zip(BUCKETS, self.sums, strict=True) if float(row[0])
            ],
        }


def _row(sums: Tensor) -> dict[str, float]:
    n, k3, beyond, w, w2 = (float(x) for x in sums)
    return {"tokens": int(n), "k3": k3 / n, "beyond_2x": beyond / n, "effective_sample_size": w * w / (n * w2)}
