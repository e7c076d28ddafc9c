"""The clip's numbers beside any loss, for loops of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, as_arguments
from bandpo.clips import get_clip
from bandpo.clips.anchored import anchored
from bandpo.clips.base import Clip
from bandpo.clips.foreign import check_coefficient
from bandpo.loss.stats import BUCKETS, FIELDS, MEASURES, SIGNS, ClipStats, count
from bandpo.operator.tokens import Tokens


class Monitor:
    """Measures what a clip does, or would do, to the tokens of a loop; changes nothing.

    `update` at each micro-batch, `compute` and `reset` at each log. Nothing waits for the device before `compute`'s
    tensors are read. Its state is two tensors: over ranks `sums` add and `maxima` take the maximum.

    Args:
        clip: a name, a clip, or any object with `coefficient(tokens)`; see `get_clip`.
        clip_args: the clip's arguments, where it is a name.
        anchor: which old policy the clip measures from; see `bandpo.clips.anchored`.

    Attributes:
        clip: the clip.
        sums: as in `ClipStats`; on the device of the first tokens.
        maxima: as in `ClipStats`.

    Raises:
        InputError: an unknown clip or argument.
    """

    def __init__(
        self, clip: object = "band", clip_args: Mapping[str, Any] | None = None, *, anchor: str = "old"
    ) -> None:
        self.clip: Clip = anchored(get_clip(clip, **as_arguments(clip_args)), anchor)
        self.sums = torch.zeros(len(SIGNS), len(BUCKETS), len(FIELDS), dtype=torch.float64)
        self.maxima = torch.zeros(len(SIGNS), len(BUCKETS), len(MEASURES))
        self._empty = True

    def reset(self) -> None:
        """Forget all tokens."""
        self.sums, self.maxima = torch.zeros_like(self.sums), torch.zeros_like(self.maxima)
        self._empty = True

    @torch.no_grad()
    def update(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        rollout_logps: Tensor | None = None,
        entropies: Tensor | None = None,
        rewards: Tensor | None = None,
        state_divergence: Tensor | None = None,
        progress: float = 0.0,
    ) -> None:
        """Count the tokens of a micro-batch; waits for nothing.

        Args:
            logps: as in `policy_loss`.
            old_logps: as in `policy_loss`.
            advantages: as in `policy_loss`.
            mask: as in `policy_loss`.
            rollout_logps: as in `Tokens`.
            entropies: as in `Tokens`.
            rewards: as in `Tokens`.
            state_divergence: as in `Tokens`.
            progress: how far training is, from 0 to 1, for a clip with a schedule.

        Raises:
            InputError: as `policy_loss`.
        """
        tokens = Tokens(logps, old_logps, advantages, mask, rollout_logps, entropies, rewards, state_divergence)
        if not logps.numel():  # no token is no number, see `compute`
            return
        clip = self.clip.at(progress)
        c = clip.coefficient(tokens)
        check_coefficient(clip.name, c, tokens)
        found = count(clip, tokens, c)
        if not self._empty:  # empty ones may still be on the CPU, and moving them would wait
            found = found + ClipStats(self.sums, self.maxima.to(found.maxima.dtype))
        self.sums, self.maxima, self._empty = found.sums, found.maxima, False

    def merge(self, other: Monitor) -> None:
        """Add what another monitor of the same clip has counted.

        Args:
            other: of another process or data loader.

        Raises:
            InputError: it is no monitor, or one of another clip.
        """
        if not isinstance(other, Monitor):
            raise InputError(f"other={type(other).__name__}: must be a bandpo.Monitor of the same clip")
        mine, theirs = (re.sub(" at 0x[0-9a-f]+", "", repr(x.clip)) for x in (self, other))
        if mine != theirs:
            raise InputError(
                f"other: measures {theirs}, and this monitor {mine}: must be the same clip; merge like with like"
            )
        self.sums = self.sums + other.sums.to(self.sums)
        self.maxima = torch.maximum(self.maxima, other.maxima.to(self.maxima))
        self._empty = self._empty and other._empty

    def compute(self, prefix: str = "clip/", only: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the numbers of all tokens since the last reset.

        Args:
            prefix: put before each name.
            only: the names wanted, such as ("zero_grad", "gradient_kept"); all of `ClipStats.metrics` when None.

        Returns:
            Name to tensor of no dimension, on the tokens' device; ``float`` of one waits for it. Nothing, {}, before
            the first update: shares of no token would read as those of a clip that takes everything.

        Raises:
            InputError: `only` names what there is not.
        """
        found = ClipStats(self.sums, self.maxima).metrics(prefix, only)
        return {} if self._empty and not bool(self.sums.any()) else found  # not empty where other ranks' were summed in
