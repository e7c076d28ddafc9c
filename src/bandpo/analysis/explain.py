"""What a clip does to given tokens, and what that means; a stream of any length in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, as_arguments, as_mask, check_tensor, per_token
from bandpo.analysis.advice import advise
from bandpo.analysis.entropy import Entropy, logit_step, natural_gradient
from bandpo.analysis.explanation import Explanation
from bandpo.analysis.gap import Gap
from bandpo.analysis.others import Others
from bandpo.analysis.reached import Reached
from bandpo.analysis.sanity import LOGS, Sanity, check_mask
from bandpo.analysis.text import many
from bandpo.clips import get_clip
from bandpo.clips.anchored import anchored
from bandpo.clips.base import Clip
from bandpo.clips.foreign import check_coefficient
from bandpo.clips.schedule import constant
from bandpo.loss.stats import ClipStats, count
from bandpo.operator.tokens import Tokens

PIECE = 1 << 17  # tokens at a time
OPTIONAL = ("rollout_logps", "entropies", "rewards", "state_divergence")


@torch.no_grad()
def explain(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: object = "fixed",
    clip_args: Mapping[str, Any] | None = None,
    anchor: str = "old",
    rollout_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    logits: Tensor | None = None,
    rewards: Tensor | None = None,
    state_divergence: Tensor | None = None,
    batch: int | None = None,
) -> Explanation:
    """Return what a clip does to these tokens, what others would do, and what to make of it.

    Args:
        logps: natural-log probabilities of the taken actions under the policy in training, (batch, token), or (token,)
            where the sequences are not known.
        old_logps: the same under the policy that the ratio divides by, same shape.
        advantages: per token, or per sequence (batch,) or (batch, 1).
        mask: 1 for tokens, 0 for padding, same shape, or None.
        clip: the clip in use: a name, a clip, or any object with `coefficient(tokens)`; PPO's 0.2 / 0.2 unless given.
        clip_args: the clip's arguments, where it is a name.
        anchor: which old policy the clip measures from; see `bandpo.clips.anchored`.
        rollout_logps: as in `Tokens`; the gap to the engine that sampled is explained where they are known.
        entropies: as in `Tokens`; for the natural-gradient estimate of what the entropy does.
        logits: of the policy in training at each token, (batch, token, vocabulary), for what a plain step on the
            logits does to the entropy.
        rewards: as in `Tokens`.
        state_divergence: as in `Tokens`.
        batch: how many sequences a clip that looks at the batch is shown at once, as a host's micro-batch; None for as
            many whole sequences as make 131,072 tokens. (token,) tensors: how many tokens.

    Returns:
        `Explanation`: print it, or take `to_dict()`. It waits for the device; the work is done on the CPU.

    Raises:
        InputError: shapes or dtypes that do not fit, log-probabilities that must be something else, no token, an
            unknown clip, or one that needs what was not given.
    """
    made = Explainer(clip, clip_args=clip_args, anchor=anchor, batch=batch)
    made.update(
        logps, old_logps, advantages, mask, rollout_logps=rollout_logps, entropies=entropies, logits=logits,
        rewards=rewards, state_divergence=state_divergence,
    )  # fmt: skip
    return made.compute()


class Explainer:
    """The same for a stream of tokens that need not fit into memory: `update` with each part, then `compute`.

    Args:
        clip: as in `explain`.
        clip_args: as in `explain`.
        anchor: as in `explain`.
        batch: as in `explain`.
        others: whether to ask every clip of the registry too.

    Raises:
        InputError: an unknown clip, or `batch` below 1.
    """

    def __init__(
        self,
        clip: object = "fixed",
        *,
        clip_args: Mapping[str, Any] | None = None,
        anchor: str = "old",
        batch: int | None = None,
        others: bool = True,
    ) -> None:
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise InputError(f"batch={batch!r}: must be a whole number of sequences of at least 1, or None")
        self.clip: Clip = anchored(constant(get_clip(clip, **as_arguments(clip_args))), anchor)
        self.batch, self.seen, self.padding = batch, 0, 0
        self.stats: ClipStats | None = None
        self.sanity, self.reached, self.others = Sanity(), Reached(), Others() if others else None
        self.gap: Gap | None = None
        self.entropy = Entropy()
        self.remarks: list[str] = []

    @torch.no_grad()
    def update(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        **optional: Tensor | None,
    ) -> None:
        """Look at more tokens; arguments as in `explain`.

        Args:
            logps: as in `explain`.
            old_logps: as in `explain`.
            advantages: as in `explain`.
            mask: as in `explain`.
            logits: as in `explain`.
            **optional: rollout_logps, entropies, rewards, state_divergence, as in `explain`.

        Raises:
            InputError: as `explain`.
        """
        check_tensor("logps", logps)
        if logps.dim() not in (1, 2):
            raise InputError(
                f"logps has shape {tuple(logps.shape)}: must be (batch, token) or (token,); of logits over a "
                "vocabulary give torch.log_softmax(logits, -1) of the taken tokens"
            )
        if logits is not None:
            check_tensor("logits", logits, what="a floating-point tensor")
            if logits.shape[:-1] != logps.shape or not logits.shape[-1]:
                raise InputError(
                    f"logits has shape {tuple(logits.shape)}: must be that of logps and the vocabulary, "
                    f"{(*logps.shape, 'vocabulary')}"
                )
        given = {"logps": logps, "old_logps": old_logps} | {k: v for k, v in optional.items() if v is not None}
        for name, x in given.items():
            if name not in OPTIONAL and name not in LOGS:
                raise InputError(f"{name}: must be one of {', '.join(OPTIONAL)}")
            if name == "rewards":
                given[name] = per_token(x, logps, name).expand_as(logps)
            else:
                check_tensor(name, x, like=logps)
        given["advantages"] = per_token(advantages, logps).expand_as(logps)
        token = as_mask(mask, logps)
        if mask is not None:
            check_mask("mask", mask, self.seen)
        elif logps.dim() > 1:
            self.sanity.unmasked(logps, old_logps)
        given["mask"] = torch.ones_like(logps, dtype=torch.bool) if token is None else token
        if logits is not None:
            given["logits"] = logits
        for piece in self._pieces(given):
            self._look(piece)

    def _pieces(self, given: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield whole sequences, few enough to hold little memory; on the CPU."""
        logps = given["logps"]
        width = 1 if logps.dim() == 1 else max(logps.shape[1], 1)
        size = self.batch or max(1, PIECE // width)
        for i in range(0, logps.shape[0], size):
            yield {name: x[i : i + size].detach().to("cpu") for name, x in given.items()}

    def _look(self, piece: dict[str, Tensor]) -> None:
        mask, logits = piece.pop("mask"), piece.pop("logits", None)
        self.padding += mask.numel() - int(mask.sum())
        kept = self.sanity.clean(piece if logits is None else piece | {"logits": logits}, mask, self.seen)
        self.seen += len(mask)
        if not bool(kept.any()):
            return
        piece |= {name: piece[name].clamp(max=0.0) for name in LOGS if name in piece}
        t = Tokens(mask=None if bool(kept.all()) else kept, **piece)  # type: ignore[arg-type]
        c = self.clip.coefficient(t)
        check_coefficient(self.clip.name, c, t)
        stats = count(self.clip, t, c)
        self.stats = stats if self.stats is None else self.stats + stats
        self.reached.add(self.clip, t, c, kept)
        per_c = self._entropy(t, c, logits, kept)
        if self.others is not None:
            self.others.add(t, per_c)
        optional = [None if x is None else x[kept] for x in (t.entropies, t.rollout_logps)]
        self.sanity.look(t.log_q[kept], t.log_p[kept], *optional)
        if t.rollout_logps is not None:
            self.gap = self.gap or Gap()
            self.gap.add(t.log_p, t.rollout_logps, kept)

    def _entropy(self, t: Tokens, c: Tensor, logits: Tensor | None, kept: Tensor) -> Tensor | None:
        """Count both forms of dH where they can be had; return the better one for c = 1."""
        forms = {}
        if t.entropies is not None:
            forms["natural_gradient"] = natural_gradient(t.log_q, t.entropies)
        if logits is not None:
            forms["logit_step"] = logit_step(t.log_q, logits)
        forms = {name: torch.where(kept, x, 0.0) for name, x in forms.items()}
        for name, x in forms.items():
            self.entropy.add(name, x, c, t.weighted, t.advantages)
        return forms.get("logit_step", forms.get("natural_gradient"))

    def compute(self) -> Explanation:
        """Return the explanation of all tokens so far.

        Returns:
            `Explanation`.

        Raises:
            InputError: there was no token.
        """
        if self.stats is None:
            if said := "; ".join(self.sanity.remarks()):
                spare = [name for name in (*OPTIONAL, "logits") if f"{name} is " in said]
                way = f", or leave {' and '.join(spare)} out" if spare else ""
                raise InputError(f"no token to look at: {said}; mend these values{way}")
            raise InputError(
                "no token to look at: mask is 0 everywhere, or there are no tokens; give tokens where mask is 1"
            )
        tokens = int(float(self.stats.sums[..., 0].sum()))
        found = self.reached.as_dict(self.clip, self.stats, tokens)
        remarks = [*self.sanity.remarks(), *self.remarks]
        if tokens < 100:
            remarks.append(f"{many(tokens, 'token')}: too few for shares and percentiles")
        found["counts"] |= {"padding": self.padding, "left_out": self.sanity.left_out}
        found |= {
            "clips": [] if self.others is None else self.others.rows(),
            "rollout": None if self.gap is None else self.gap.as_dict(),
        }
        found |= {"entropy": self.entropy.as_dict(tokens), "remarks": remarks}
        return Explanation(**found, advice=advise(found), sample=self.reached.sample(), chosen=self.clip)
