"""torchrl's PPO and GRPO losses with bounds per action or token; tested with torchrl 0.14.1 and tensordict 0.14.3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo import Bounds, Region, clip_stats
from bandpo._checks import InputError
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import CLIP, make_clip, refuse_density

HOST = HOSTS["torchrl"]
with HOST.imports():
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.llm import GRPOLoss

_CLAMP = "log_weight.clamp(*self._clip_bounds)"


def check_seam() -> None:
    """Check that the installed torchrl still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(ClipPPOLoss, "forward", (_CLAMP, "self._log_weight("))
    HOST.check_source(GRPOLoss, "_compute_policy_objective", (_CLAMP,))
    HOST.check_source(GRPOLoss, "_log_weight", ('tensordict.set("_cur_log_prob"',))


class _Banded:
    """Answers torchrl's `_clip_bounds` with the bounds of the batch at hand; nothing of it is a buffer."""

    _bounds: Bounds | None
    _seen: tuple[Tensor, ...]

    def _set_clip(self, clip: str | Region, clip_args: Mapping[str, Any] | None, options: dict[str, Any]) -> None:
        if "clip_epsilon" in options:
            raise InputError("clip_epsilon: must be left out, clip sets the bounds; for a fixed one give clip='fixed'")
        self.clip = make_clip(clip, clip_args)
        self._bounds, self._seen = None, ()

    @property
    def _clip_bounds(self) -> tuple[Tensor, Tensor]:
        if self._bounds is None:
            raise HOST.error("it asks for the bounds too early")
        return self._bounds.log_low.unsqueeze(-1), self._bounds.log_high.unsqueeze(-1)

    def _take(self, cur: Tensor, old: Tensor | None, log_weight: Tensor) -> None:
        """Make the bounds of this batch, from the very tensor in the ratio's denominator."""
        if not isinstance(old, Tensor) or old.unsqueeze(-1).shape != log_weight.shape:
            raise InputError(
                "sample_log_prob has several entries: must be one log-probability per action; sum those of several "
                "heads with tensordict's set_composite_lp_aggregate(True)"
            )
        self._bounds = self.clip.bounds(old.detach())
        self._seen = cur.detach(), old.detach()

    def clip_metrics(self, prefix: str = "clip/") -> dict[str, Tensor]:
        """Return what the clip did in the last forward pass; costs nothing until it is called.

        Args:
            prefix: put before each name.

        Returns:
            Name to tensor of no dimension, as in `bandpo.ClipStats.metrics`.

        Raises:
            InputError: there was no forward pass yet.
        """
        if len(self._seen) < 3:
            raise InputError("clip_metrics(): call the loss first")
        cur, old, advantages, *mask = self._seen
        return clip_stats(cur, old, advantages.squeeze(-1), *mask, clip=self.clip).metrics(prefix)


class BandClipPPOLoss(_Banded, ClipPPOLoss):
    """torchrl's ClipPPOLoss whose clip has bounds per action; state_dict, keywords and outputs stay torchrl's.

    Args:
        *args: as ClipPPOLoss.
        clip: name of the clip, or a clip.
        clip_args: the clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        **options: as ClipPPOLoss, without clip_epsilon.

    Raises:
        InputError: bad clip, an option that would go round it, actions that are not discrete, or torchrl has changed.
    """

    def __init__(
        self, *args: Any, clip: str | Region = CLIP, clip_args: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        check_seam()
        if options.get("clip_value") is True:
            raise InputError("clip_value=True: would take clip_epsilon; give a number")
        super().__init__(*args, **options)
        self._set_clip(clip, clip_args, options)

    def _get_cur_log_prob(self, tensordict: Any, params: Any = None) -> Any:
        result = super()._get_cur_log_prob(tensordict, params=params)
        if params is None:
            self._cur, dist = result[0], result[1]
            if not _is_discrete(dist):
                refuse_density(self.clip, type(dist).__name__)
        else:  # the proximal policy of delay_actor: then the ratio divides by it
            self._prox = result[0]
        return result

    def _log_weight(self, tensordict: Any, adv_shape: Any) -> Any:
        result = super()._log_weight(tensordict, adv_shape)
        key = self.tensor_keys.sample_log_prob
        several = isinstance(key, list)  # one for each action head
        old = None if several else self._prox if self.delay_actor else tensordict.get(key)
        self._take(self._cur, old, result[0])
        self._cur = self._prox = None  # they hold the graph
        self._seen = (*self._seen, self._advantage)
        return result

    def _maybe_normalize_advantage(self, *args: Any, **named: Any) -> Any:
        advantage = super()._maybe_normalize_advantage(*args, **named)
        self._advantage = advantage.detach()
        return advantage


class BandGRPOLoss(_Banded, GRPOLoss):
    """torchrl's GRPOLoss for language models whose clip has bounds per token.

    Args:
        *args: as GRPOLoss.
        clip: name of the clip, or a clip.
        clip_args: the clip's arguments.
        **options: as GRPOLoss, without clip_epsilon.

    Raises:
        InputError: bad clip, or torchrl has changed.
    """

    def __init__(
        self, *args: Any, clip: str | Region = CLIP, clip_args: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        check_seam()
        super().__init__(*args, **options)
        self._set_clip(clip, clip_args, options)

    def _log_weight(self, tensordict: Any, adv_shape: Any) -> Any:
        result = super()._log_weight(tensordict, adv_shape)
        log_weight, mask, key = result[0], result[3], self.tensor_keys.sample_log_prob
        old = tensordict.get(key, as_padded_tensor=True, padding_side="left", padding_value=0.0)
        old = torch.where(mask, old, 0.0)
        self._take(tensordict.get("_cur_log_prob"), old, log_weight)
        self._mask = mask
        return result

    def _compute_policy_objective(self, log_weight: Tensor, advantage: Tensor) -> Any:
        self._seen = (*self._seen[:2], advantage.detach(), self._mask)
        return super()._compute_policy_objective(log_weight, advantage)


def _is_discrete(dist: Any) -> bool:
    try:
        return bool(dist.support.is_discrete)
    except NotImplementedError:  # the distribution does not say
        return True
