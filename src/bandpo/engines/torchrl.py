"""torchrl's PPO and GRPO losses under any clip; tested with torchrl 0.14.1 and tensordict 0.14.3.

A region such as Band gives torchrl's clamp two bounds per action or token. Any other clip goes as advantages c / r,
with the clamp opened wide. A fixed interval stays torchrl's own clip, in torchrl's own buffers, so that it can be
annealed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo import Clip, Fixed, clip_stats
from bandpo._input import InputError
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

HOST = HOSTS["torchrl"]
with HOST.imports():
    from tensordict.nn import CompositeDistribution, dispatch
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.common import LossModule
    from torchrl.objectives.llm import GRPOLoss

_CLAMP = "log_weight.clamp(*self._clip_bounds)"
_MARGINS = ("clip_epsilon", "clip_epsilon_low", "clip_epsilon_high")  # torchrl's buffers


def check_seam() -> None:
    """Check that the installed torchrl still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(ClipPPOLoss, "forward", (_CLAMP, "self._maybe_normalize_advantage(", "self._log_weight("))
    HOST.check_source(GRPOLoss, "_compute_policy_objective", (_CLAMP,))
    HOST.check_source(GRPOLoss, "_log_weight", ('tensordict.set("_cur_log_prob"',))
    HOST.check_source(LossModule, "_reduce_loss", ("in self._loss_mask_keys()", "self._expand_loss_mask("))


class _Banded:
    """What both losses share: the clip, the bounds of the batch at hand, and what it did."""

    _buffers: Any
    _own: Clip
    _fixed: bool
    _bounds: tuple[Tensor, Tensor] | None
    _seen: tuple[Any, ...] | None
    _shaped: _adapter.Shaped | None

    def _set_clip(self, clip: Clip) -> None:
        """Take the clip; torchrl's margins stay if they are the clip, and go if it has none."""
        self._fixed = _is_fixed(clip)
        names = [name for name in _MARGINS if name in self._buffers]
        for i, name in enumerate(names):
            if self._fixed:  # filled afterwards, because torchrl takes no lower margin of 1
                self._buffers[name].fill_((clip.eps_low, clip.eps_high)[i])  # type: ignore[attr-defined]
            else:
                del self._buffers[name]
        self._bounds = self._seen = self._shaped = None
        self._own = clip

    @property
    def clip(self) -> Clip:
        """The clip in use; a fixed one with the margins that torchrl's buffers hold now."""
        if not self._fixed:
            return self._own
        low, *high = (float(self._buffers[name]) for name in _MARGINS if name in self._buffers)
        return dataclasses.replace(self._own, eps_low=low, eps_high=(high or [low])[0])  # type: ignore[type-var]

    def _without(self, name: str) -> AttributeError:
        if self._fixed:
            mine = ", ".join(x for x in _MARGINS if x in self._buffers)
            return AttributeError(f"{name}: this loss has {mine}, because of its clip {self._own!r}; set that")
        return AttributeError(
            f"{name}: clip={self._own.name!r} has no margins of torchrl's; give clip='fixed' to anneal those, or a "
            "tensor as delta to anneal a band's radius"
        )

    def __getattr__(self, name: str) -> Any:
        if name in _MARGINS and "_own" in self.__dict__ and name not in self._buffers:
            raise self._without(name)
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would make a new attribute, which nothing reads
        if name in _MARGINS and "_own" in self.__dict__ and name not in self._buffers:
            raise self._without(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a checkpoint of torchrl's loss too: its margins are dropped where the clip has none."""
        for name in () if self._fixed else _MARGINS:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    @property
    def _clip_bounds(self) -> tuple[Any, Any]:
        if self._fixed:
            return super()._clip_bounds  # type: ignore[misc,no-any-return]
        if not _adapter.by_margins(self._own):
            return -math.inf, math.inf
        if self._bounds is None:
            raise HOST.error("it asks for the bounds too early")
        return self._bounds

    def _see(self, cur: Tensor, old: Tensor, advantage: Tensor, mask: Tensor | None) -> None:
        """Make the bounds of this batch, and keep what the metrics are made from."""
        self._seen, self._shaped = (cur.detach(), old, advantage.detach(), mask), None
        if _adapter.by_margins(self._own) and not self._fixed:
            bounds = self._own.bounds(old)
            self._bounds = bounds.log_low.unsqueeze(-1), bounds.log_high.unsqueeze(-1)

    def _shape(self, cur: Tensor, old: Tensor, advantage: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """For a clip that goes as advantages, return the log-ratio, the advantages and the share without a gradient."""
        self._shaped = shaped = _adapter.shape(self._own, cur, old, _for_each(advantage, cur), mask)
        return (cur - shaped.old_logps).unsqueeze(-1), shaped.advantages.unsqueeze(-1), shaped.zero_grad

    def clip_metrics(self, prefix: str = "clip/", how_much: str = "brief") -> dict[str, Tensor]:
        """Return what the clip did in the last forward pass; costs nothing until it is called.

        Args:
            prefix: put before each name.
            how_much: "brief" (nine numbers), "full" (by sign of the advantage and by bucket of old probability too) or
                "none".

        Returns:
            Name to tensor of no dimension, as in `bandpo.ClipStats.metrics`.

        Raises:
            InputError: there was no forward pass yet, or another `how_much`.
        """
        _adapter.check_how_much(how_much)
        if self._seen is None:
            raise InputError("clip_metrics(): call the loss first")
        if self._shaped is not None:
            stats = self._shaped.stats
        else:
            cur, old, advantage, mask = self._seen
            stats = clip_stats(cur, old, _for_each(advantage, cur), mask, clip=self.clip)
        return _adapter.chosen_metrics(stats, how_much, prefix)


class BandClipPPOLoss(_Banded, ClipPPOLoss):
    """torchrl's ClipPPOLoss under any clip of single actions; keywords and outputs stay torchrl's.

    Under a clip that goes as advantages "clip_fraction" is the share of actions without a gradient.

    Args:
        *args: as ClipPPOLoss.
        clip: the clip: a name or an import path, as `bandpo.get_clip` takes it, a clip, or any object with
            `coefficient(tokens)`.
        clip_args: the clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        **options: as ClipPPOLoss, without clip_epsilon.

    Attributes:
        clip: the clip in use.

    Raises:
        InputError: bad clip, one of whole sequences, an option that would go round it, actions that are not discrete,
            or torchrl has changed.
        AttributeError: `clip_epsilon` or its like is read or set where the clip is no fixed interval.
    """

    def __init__(
        self, *args: Any, clip: object = _adapter.CLIP, clip_args: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        check_seam()
        made = _make_clip(clip, clip_args, options)
        _adapter.refuse_sequences(made, "torchrl's PPO has single actions")
        if not _adapter.by_margins(made) and options.get("max_importance_ratio") is not None:
            raise InputError(
                f"max_importance_ratio={options['max_importance_ratio']!r} with clip={made.name!r}: must be left out, "
                "it caps the ratio again; give a clip with a ceiling, such as clip='cispo'"
            )
        epsilon = _host_margins(made)
        if options.get("clip_value") is True and not isinstance(epsilon.get("clip_epsilon"), float):
            raise InputError(
                f"clip_value=True: would take clip_epsilon, one number, which {made!r} has not; give a number"
            )
        super().__init__(*args, **options, **epsilon)
        self._set_clip(made)

    _kept: Any
    _zero_grad: Tensor | None

    @dispatch
    def forward(self, tensordict: Any) -> Any:
        """Return torchrl's own losses.

        Args:
            tensordict: as ClipPPOLoss.

        Returns:
            As ClipPPOLoss.
        """
        self._kept = self._zero_grad = None
        out = super().forward(tensordict)
        if self._kept is not None or not (_adapter.by_margins(self._own) or self._zero_grad is not None):
            raise HOST.error("its PPO loss went round the clip")
        if self._zero_grad is not None:
            out.set("clip_fraction", self._zero_grad)
        return out

    def _get_cur_log_prob(self, tensordict: Any, params: Any = None) -> Any:
        result = super()._get_cur_log_prob(tensordict, params=params)
        if params is None:
            self._cur, dist = result[0], result[1]
            if self._own.uses_p and not _is_discrete(dist):
                _adapter.refuse_density(self._own, type(dist).__name__)
        else:  # the proximal policy of delay_actor: then the ratio divides by it
            self._prox = result[0]
        return result

    def _maybe_normalize_advantage(self, advantage: Tensor, tensordict: Any, **named: Any) -> Any:
        advantage = super()._maybe_normalize_advantage(advantage, tensordict, **named)
        self._advantage = advantage.detach()
        if _adapter.by_margins(self._own):
            return advantage
        # c / r goes in after torchrl has normalised A, and needs the ratios, which torchrl asks for after this
        log_weight, *rest = super()._log_weight(tensordict, adv_shape=advantage.shape[:-1])
        tokens = self._tokens(tensordict, log_weight)
        self._see(*tokens)
        log_weight, advantage, self._zero_grad = self._shape(*tokens)
        self._kept = (log_weight, *rest)
        return advantage

    def _log_weight(self, tensordict: Any, adv_shape: Any) -> Any:
        if self._kept is not None:
            result, self._kept = self._kept, None
            return result
        result = super()._log_weight(tensordict, adv_shape)
        self._see(*self._tokens(tensordict, result[0]))
        return result

    def _tokens(self, tensordict: Any, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the log-probabilities, those in the ratio's denominator, the advantages and torchrl's mask."""
        key, shape = self.tensor_keys.sample_log_prob, log_weight.shape[:-1]
        acted = tensordict.select(*key) if isinstance(key, list) else tensordict.get(key)
        cur, old = _joint(self._cur, shape), _joint(self._prox if self.delay_actor else acted, shape)
        self._cur = self._prox = None  # they hold the graph
        if cur.shape != shape or old.shape != shape:
            raise InputError(
                f"sample_log_prob has shape {tuple(old.shape)} and the actor's {tuple(cur.shape)}: both must be "
                f"{tuple(shape)}, one for each action; sum over the dimensions of an action, as "
                "torch.distributions.Independent does"
            )
        mask = None
        for key in self._loss_mask_keys():
            found = tensordict.get(key, default=None)
            if found is not None:
                found = self._expand_loss_mask(found, log_weight).squeeze(-1)
                mask = found if mask is None else mask & found
        return cur, old.detach(), self._advantage, mask


class BandGRPOLoss(_Banded, GRPOLoss):
    """torchrl's GRPOLoss for language models under any clip.

    Under a clip that goes as advantages "clip_fraction" is the share of tokens without a gradient.

    Args:
        *args: as GRPOLoss.
        clip: as in `BandClipPPOLoss`; sequences are the rows of the batch.
        clip_args: the clip's arguments.
        **options: as GRPOLoss, without clip_epsilon.

    Attributes:
        clip: the clip in use.

    Raises:
        InputError: bad clip, an option that would go round it, or torchrl has changed.
        AttributeError: `clip_epsilon_low` or its like is read or set where the clip is no fixed interval.
    """

    def __init__(
        self, *args: Any, clip: object = _adapter.CLIP, clip_args: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        check_seam()
        made = _make_clip(clip, clip_args, options)
        if made.looks_at == "sequence" and options.get("kl_mask_threshold"):
            raise InputError(
                f"kl_mask_threshold={options['kl_mask_threshold']!r} with clip={made.name!r}: must be left out, it "
                "acts on single tokens, and this clip on sequences"
            )
        super().__init__(*args, **options, **_host_margins(made))
        self._set_clip(made)

    def _log_weight(self, tensordict: Any, adv_shape: Any) -> Any:
        result = super()._log_weight(tensordict, adv_shape)
        mask, key = result[3], self.tensor_keys.sample_log_prob
        old = tensordict.get(key, as_padded_tensor=True, padding_side="left", padding_value=0.0)
        self._batch = tensordict.get("_cur_log_prob"), torch.where(mask, old, 0.0), mask
        return result

    def _compute_policy_objective(self, log_weight: Tensor, advantage: Tensor) -> Any:
        cur, old, mask = self._batch
        del self._batch  # it holds the graph
        tokens = cur, old, advantage, mask
        self._see(*tokens)
        if _adapter.by_margins(self._own):
            return super()._compute_policy_objective(log_weight, advantage)
        log_weight, advantage, zero_grad = self._shape(*tokens)
        return super()._compute_policy_objective(log_weight, advantage)[0], zero_grad


def _make_clip(clip: object, clip_args: Mapping[str, Any] | None, options: dict[str, Any]) -> Clip:
    """Return the clip, if torchrl has what it needs."""
    if "clip_epsilon" in options:
        raise InputError(
            "clip_epsilon: must be left out, clip sets the bounds; for a fixed one give clip='fixed' and "
            "clip_args={'eps_low': ..., 'eps_high': ...}"
        )
    made = _adapter.make_clip(clip, clip_args)
    _adapter.refuse_needs(made, (), "torchrl, with its one set of old log-probabilities,")
    return made


def _is_fixed(clip: Clip) -> bool:
    return isinstance(clip, Fixed) and type(clip).bounds is Fixed.bounds


def _host_margins(clip: Clip) -> dict[str, Any]:
    """Return the `clip_epsilon` that torchrl's own loss is made with; none where the clip is no fixed interval."""
    if not _is_fixed(clip):
        return {}
    low, high = float(clip.eps_low), float(clip.eps_high)  # type: ignore[attr-defined]
    return {"clip_epsilon": low if low == high else (min(low, 0.5), high)}  # `_set_clip` puts the exact ones


def _joint(logps: Any, shape: Any) -> Tensor:
    """Return log-probabilities of whole actions: those of several heads summed, as torchrl sums them."""
    if isinstance(logps, Tensor):
        return logps
    return sum(head.reshape(*shape, -1).sum(-1) for head in logps.values(True, True))  # type: ignore[return-value]


def _for_each(advantage: Tensor, logps: Tensor) -> Tensor:
    """Return one advantage for each log-probability, as torchrl broadcasts them."""
    between = logps.dim() + 1 - advantage.dim()  # dimensions of tokens within an action
    if advantage.dim() > 1 and between > 0:
        advantage = advantage.reshape(*advantage.shape[:-1], *(1,) * between, advantage.shape[-1])
    try:
        return advantage.expand(*logps.shape, 1).squeeze(-1)
    except RuntimeError:
        raise InputError(
            f"advantage has shape {tuple(advantage.shape)}: must be one for each ratio, {(*logps.shape, 1)}; "
            "unsqueeze(-1) what has no last dimension"
        ) from None


def _is_discrete(dist: Any) -> bool:
    if isinstance(dist, CompositeDistribution):
        return all(_is_discrete(part) for part in dist.dists.values())
    try:
        return bool(dist.support.is_discrete)
    except NotImplementedError:  # the distribution does not say
        return True
    except Exception:  # torchrl's TanhNormal breaks here, whatever it is asked
        return False
