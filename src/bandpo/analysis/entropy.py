"""What a clip does to the entropy, to first order: two forms, of which each needs what the other does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 20  # logits at a time
FORMS = ("logit_step", "natural_gradient")


@torch.no_grad()
def logit_step(logps: Tensor, logits: Tensor) -> Tensor:
    """Return what a plain gradient step on the logits does to each state's entropy, for c = 1.

    dH / eta = -c [pi_a (log pi_a + H) - sum_k pi_k^2 (log pi_k + H)]

    Args:
        logps: log pi_a of the taken actions, any shape.
        logits: of the same policy, that shape and the vocabulary.

    Returns:
        Tensor of the shape of `logps`, float64, nats for a step of eta = 1.

    Source: the derivative of H = -sum_k pi_k log pi_k along eta c (e_a - pi), which is the policy gradient's step.
    """
    flat, own = logits.flatten(0, -2), logps.flatten()
    size = max(1, PIECE // logits.shape[-1])
    parts = []
    for some, log_a in zip(torch.split(flat, size), torch.split(own, size), strict=True):
        log_pi = torch.log_softmax(some.double(), -1)
        pi, safe = torch.exp(log_pi), log_pi.clamp(min=-1e4)  # 0 log 0 is 0
        entropy = -(pi * safe).sum(-1)
        away = safe + entropy[:, None]
        log_a = log_a.double()
        parts.append((pi * pi * away).sum(-1) - torch.exp(log_a) * (log_a + entropy))
    return torch.cat(parts).view(logps.shape)


def natural_gradient(logps: Tensor, entropies: Tensor) -> Tensor:
    """Return the estimate of what a step of the natural gradient does to each state's entropy, for c = 1.

    dH / eta = -c (log pi_a + H)

    Args:
        logps: log pi_a of the taken actions, any shape.
        entropies: H of their states in nats, same shape.

    Returns:
        Tensor of that shape, float64, nats for a step of eta = 1.

    Source: arXiv 2505.22617, as the covariance of log pi and A.
    """
    return -(logps.double().clamp(min=-1e4) + entropies.double())


class Entropy:
    """Sums over tokens of dH, under the clip and without one, by sign of the advantage."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, form: str, per_c: Tensor, c: Tensor, weighted: Tensor, advantages: Tensor) -> None:
        """Count tokens; all of one shape, 0 in padding.

        Args:
            form: one of `FORMS`.
            per_c: dH for c = 1.
            c: of the clip.
            weighted: r A, the c of no clip.
            advantages: A.
        """
        d, free = per_c * c.double(), per_c * weighted.double()
        found = [d.sum(), free.sum(), *(x[s].sum() for x in (d, free) for s in (advantages > 0, advantages < 0))]
        self.sums[form] = self.sums.get(form, 0.0) + torch.stack(found)

    def as_dict(self, tokens: int) -> dict[str, Any] | None:
        """Return the means over the tokens, nats for a step of eta = 1; None where neither form could be computed."""
        names = ("clip", "no_clip", "clip_positive", "clip_negative", "no_clip_positive", "no_clip_negative")
        if not self.sums:
            return None
        return {
            form: dict(zip(names, (float(x) / tokens for x in self.sums[form]), strict=True))
            if form in self.sums
            else None
            for form in FORMS
        }
