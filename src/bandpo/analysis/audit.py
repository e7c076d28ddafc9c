"""The divergence of whole distributions, from logits: what the band, which sees one action, cannot see.

Merging outcomes never raises an f-divergence, so  binary <= top-k <= whole.  Everything is computed in float64, a piece
of the states at a time: no copy of the logits is made, and p f(q/p) keeps its digits and its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._input import InputError, check_tensor
from bandpo.loss.stats import BUCKETS, EDGES
from bandpo.operator.divergence import Divergence
from bandpo.operator.family import get_divergence
from bandpo.operator.radius import Delta, check_delta, delta_like
from bandpo.operator.tokens import Move, Outcome, working_dtype

PIECE = 1 << 17  # logits at a time: six float64 tensors of 1 MiB, which a CPU's cache holds; 32 times as many elsewhere
FIELDS = ("tokens", "outside", "beyond", "missed", "binary", "whole")


@dataclass(frozen=True)
class Audit:
    """What the band saw of the whole distributions, as sums over tokens by bucket of old probability.

    Add two to join batches; sum the field to join ranks.

    Args:
        sums: shape (buckets, fields), float64: tokens, outside (tokens out of their band), beyond (states whose whole
            divergence exceeds delta), missed (those of them whose token is inside) and the sums of the token's binary
            and of the state's whole divergence.
    """

    sums: Tensor

    def __add__(self, other: Audit) -> Audit:
        return Audit(self.sums + other.sums)

    def metrics(self, prefix: str = "") -> dict[str, Tensor]:
        """Return shares and means, overall and by bucket, as tensors of no dimension; 0 where there is no token.

        Args:
            prefix: put before each name.

        Returns:
            tokens (a count), outside, beyond, missed (shares of the tokens), binary_mean, whole_mean, and ratio, the
            first mean by the second; the same with "/" and the bucket's name for each.
        """
        rows = torch.cat([self.sums.sum(0, keepdim=True), self.sums])
        means = rows[:, 1:] / rows[:, :1].clamp(min=1.0)
        ratio = means[:, 3:4] / means[:, 4:5].clamp(min=torch.finfo(means.dtype).tiny)
        names = ("tokens", *FIELDS[1:4], "binary_mean", "whole_mean", "ratio")
        keys = [f"{prefix}{name}{place}" for place in ("", *(f"/{bucket}" for bucket in BUCKETS)) for name in names]
        return dict(zip(keys, torch.cat([rows[:, :1], means, ratio], 1).flatten().unbind(), strict=True))


@torch.no_grad()
def whole_divergence(logits: Tensor, old_logits: Tensor, divergence: str | Divergence = "kl") -> Tensor:
    """Return the divergence of the new policy from the old one at each state, over the whole vocabulary.

    D_f = sum_a p_a f(q_a / p_a),  p = softmax(old_logits),  q = softmax(logits)

    Args:
        logits: of the new policy, (batch, token, vocabulary), or any shape whose last dimension is the vocabulary; any
            floating dtype. An action at -inf in both policies counts nothing. At -inf in one alone it counts as
            probability e^-340: exact where the true term is finite, large where that is infinite.
        old_logits: of the old policy, same shape.
        divergence: a name or a `Divergence`.

    Returns:
        Tensor of shape (batch, token), float32 (float64 for float64 logits), nats for kl.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an unknown divergence.

    Source: Csiszar (1967).
    """
    chosen = get_divergence(divergence)
    parts = [_sum(chosen, log_q, log_p) for log_q, log_p, _ in _pieces(logits, old_logits)]
    return _join(parts, logits)


@torch.no_grad()
def top_k_divergence(
    logits: Tensor,
    old_logits: Tensor,
    k: int,
    actions: Tensor | None = None,
    divergence: str | Divergence = "kl",
) -> Tensor:
    """Return the divergence over the k likeliest actions of the old policy, the taken one, and the rest as one outcome.

    At most `whole_divergence`, which it equals for k as large as the vocabulary; at least `binary_divergence` of the
    taken action.

    Args:
        logits: as in `whole_divergence`.
        old_logits: as in `whole_divergence`.
        k: how many actions, from 1 to the vocabulary's size.
        actions: indices of the taken actions, int64, (batch, token), or None for the top k alone.
        divergence: a name or a `Divergence`.

    Returns:
        Tensor of shape (batch, token), float32 (float64 for float64 logits), nats for kl.

    Raises:
        InputError: as `whole_divergence`; `k` or `actions` that do not fit.

    Source: arXiv 2602.04879 (DPPO), for top k with a merged rest.
    """
    chosen = get_divergence(divergence)
    pieces = _pieces(logits, old_logits, actions)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= logits.shape[-1]:
        raise InputError(f"k={k!r}: must be a whole number from 1 to the vocabulary's size, {logits.shape[-1]}")
    parts = []
    for log_q, log_p, action in pieces:
        kept = log_p.topk(k, -1).indices
        if action is not None:
            twice = (kept == action).any(-1, keepdim=True)
            kept = torch.cat([kept, action], -1)
        sides = []
        for x in (log_q, log_p):
            own, rest = x.gather(-1, kept), x.scatter(-1, kept, -math.inf).logsumexp(-1, keepdim=True)
            if action is not None:
                own[..., -1:].masked_fill_(twice, -math.inf)  # counted once: at -inf in both it counts nothing
            sides.append(torch.cat([own, rest], -1))
        parts.append(_sum(chosen, *sides))
    return _join(parts, logits)


@torch.no_grad()
def audit(
    logits: Tensor,
    old_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None = None,
    *,
    delta: Delta,
    divergence: str | Divergence = "kl",
) -> Audit:
    """Return how much of the whole distributions' movement the band of the taken actions saw.

    Args:
        logits: as in `whole_divergence`.
        old_logits: as in `whole_divergence`.
        actions: indices of the taken actions, int64, (batch, token).
        mask: 1 for tokens, 0 for padding, (batch, token), or None. Padding may hold anything, NaN and -100 too.
        delta: as in `band`; of a pair, the radius of the side to which the token moved.
        divergence: a name or a `Divergence`.

    Returns:
        `Audit`; nothing has moved to the host.

    Raises:
        InputError: as `whole_divergence`; `actions`, `mask` or `delta` that do not fit.
    """
    chosen, deltas = get_divergence(divergence), check_delta(delta)
    real = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask != 0
    if real.shape != logits.shape[:-1]:
        raise InputError(f"mask has shape {tuple(real.shape)}: must be that of the tokens, {tuple(logits.shape[:-1])}")
    parts: list[tuple[Tensor, ...]] = []
    for log_q, log_p, action in _pieces(logits, old_logits, actions.where(real, 0)):
        assert action is not None
        taken = [x.gather(-1, action).squeeze(-1) for x in (log_q, log_p)]
        parts.append((_sum(chosen, log_q, log_p), *taken))
    whole, new, old = (torch.cat(x).view(real.shape) for x in zip(*parts, strict=True))
    binary = chosen.of(Move(new, old))
    low, high = (delta_like(d, whole) for d in deltas)
    radius = torch.where(new < old, low, high)
    outside, beyond = binary > radius, whole > radius
    columns = (real, outside, beyond, beyond & ~outside, binary, whole)
    rows = torch.stack([x.to(whole.dtype).where(real, 0.0).flatten() for x in columns], -1)
    bucket = sum((old > math.log(edge)).long() for edge in EDGES)
    assert isinstance(bucket, Tensor)
    return Audit(rows.new_zeros(len(BUCKETS), len(FIELDS)).index_add_(0, bucket.flatten(), rows))


def _pieces(
    logits: Tensor, old_logits: Tensor, actions: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Return (log q, log p, action) of a piece of the states at a time: (states, vocabulary) twice, (states, 1)."""
    check_tensor("logits", logits)
    check_tensor("old_logits", old_logits)
    if logits.dim() < 2 or logits.shape != old_logits.shape or logits.device != old_logits.device:
        raise InputError(
            f"logits has shape {tuple(logits.shape)} on {logits.device}, old_logits {tuple(old_logits.shape)} on "
            f"{old_logits.device}: both must be (batch, token, vocabulary) on one device"
        )
    if actions is not None and (actions.dtype != torch.int64 or actions.shape != logits.shape[:-1]):
        raise InputError(
            f"actions is {actions.dtype} of shape {tuple(actions.shape)}: must be int64 of the tokens' shape, "
            f"{tuple(logits.shape[:-1])}"
        )
    return _split(logits, old_logits, actions)


def _split(new: Tensor, old: Tensor, actions: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    if new.dim() > 2 and new.is_contiguous() and old.is_contiguous():
        new, old = new.view(-1, new.shape[-1]), old.view(-1, new.shape[-1])
        actions = None if actions is None else actions.flatten()
    if new.dim() > 2:  # a slice of a larger tensor: flattening would copy it
        for i in range(new.shape[0]):
            yield from _split(new[i], old[i], None if actions is None else actions[i])
        return
    wide = torch.float32 if new.device.type == "mps" else torch.float64
    states = max(1, PIECE * (1 if new.device.type == "cpu" else 32) // new.shape[-1])
    for i in range(0, new.shape[0], states):
        piece = slice(i, i + states)
        log_q, log_p = (torch.log_softmax(x[piece].to(wide), -1) for x in (new, old))
        yield log_q, log_p, None if actions is None else actions[piece, None]


def _sum(divergence: Divergence, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return sum p f(q / p) over the last dimension."""
    wide = log_q.dtype == torch.float64
    floor = -340.0 if wide else -40.0  # u and its square stay finite
    log_p = log_p.clamp(min=floor)
    log_u = log_q.clamp(min=floor) - log_p
    p = torch.exp(log_p)
    moved = p * torch.expm1(log_u)
    return divergence.part(Outcome(p, p + moved, moved, log_u), digits=not wide).sum(-1)  # float64 has digits to spare


def _join(parts: list[Tensor], logits: Tensor) -> Tensor:
    return torch.cat(parts).to(working_dtype(logits)).view(logits.shape[:-1])
