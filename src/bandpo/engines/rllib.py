"""RLlib's PPO learner (new API stack, torch) under any clip; tested with ray 2.60.0.

A region such as Band gives RLlib's clamp two bounds per action. Any other clip goes as advantages c / r, with the clamp
opened wide. The value function sees neither.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bandpo import ClipStats, clip_stats
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

HOST = HOSTS["rllib"]
with HOST.imports():
    from ray.rllib.algorithms.ppo.ppo import PPOConfig
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.core.columns import Columns
    from ray.rllib.evaluation.postprocessing import Postprocessing

_SEAM = (
    "torch.clamp(logp_ratio, 1 - config.clip_param, 1 + config.clip_param)",
    "batch[Postprocessing.ADVANTAGES] * logp_ratio",
    "- batch[Columns.ACTION_LOGP]",
)


def check_seam() -> None:
    """Check that the installed RLlib still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(PPOTorchLearner, "compute_loss_for_module", _SEAM)


class _Margin:
    """Stands where RLlib has one number for both sides; gives each side its own margin."""

    def __init__(self, eps_low: Tensor | float, eps_high: Tensor | float) -> None:
        self.eps_low, self.eps_high = eps_low, eps_high

    def __rsub__(self, one: float) -> Tensor | float:
        return one - self.eps_low

    def __radd__(self, one: float) -> Tensor | float:
        return one + self.eps_high


class BandLearnerMixin:
    """Gives a PPO learner any clip of single actions; put it before the learner among the bases.

    Options come from ``config.learners(learner_config_dict={"clip": "band", "clip_args": {"delta": 0.05}})``:

    - `clip`: a name or an import path, as `bandpo.get_clip` takes it, a clip, or any object with `coefficient(tokens)`;
    - `clip_args`: its arguments;
    - `clip_metrics`: how much of what the clip did with the last minibatch is in RLlib's result of a module, as
      ``clip/NAME``: "brief" (nine numbers), "full" (by sign of the advantage and by bucket of old probability too) or
      "none".

    Attributes:
        clip: the clip in use.

    Raises:
        InputError: when it is built: bad clip, one of whole sequences, `clip_param` set as well, or RLlib has changed;
            with the first minibatch: actions that are not discrete.
    """

    config: Any
    module: Any
    metrics: Any

    def build(self) -> None:
        """Check that the clip will be used, then build RLlib's learner."""
        check_seam()
        self._take_options(self.config)
        super().build()  # type: ignore[misc]

    def _take_options(self, config: Any) -> None:
        options = config.learner_config_dict
        _adapter.refuse_strays("learner_config_dict", options)  # it may hold more, for a learner of your own
        clip = options.get("clip", _adapter.CLIP)
        self.clip = _adapter.make_clip(clip, options.get("clip_args"))
        _adapter.refuse_sequences(self.clip, "RLlib's minibatches have single actions")
        _adapter.refuse_needs(self.clip, (), "RLlib, with its one set of old log-probabilities,")
        self.clip_metrics = options.get("clip_metrics", "brief")
        _adapter.check_how_much(self.clip_metrics)
        _adapter.refuse_replaced(config, {"clip_param": PPOConfig().clip_param}, clip)

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Any:
        """Return RLlib's own loss of this batch under the clip."""
        old, mask = batch[Columns.ACTION_LOGP], batch.get(Columns.LOSS_MASK)
        advantages = batch[Postprocessing.ADVANTAGES]
        if mask is not None:  # RLlib drops padding after the ratio, where NaN has reached the gradient
            old, advantages = torch.where(mask, old, 0.0), torch.where(mask, advantages, 0.0)
        if self.clip.uses_p and not _is_discrete(batch[Columns.ACTIONS]):
            _adapter.refuse_density(self.clip, "actions are not discrete")
        with torch.no_grad():
            dist = self.module[module_id].unwrapped().get_train_action_dist_cls()
            new = dist.from_logits(fwd_out[Columns.ACTION_DIST_INPUTS]).logp(batch[Columns.ACTIONS])
        if _adapter.by_margins(self.clip):
            margin = _Margin(*_adapter.margins(self.clip, old))
            stats = None if self.clip_metrics == "none" else clip_stats(new, old, advantages, mask, clip=self.clip)
        else:
            margin = _Margin(math.inf, math.inf)
            shaped = _adapter.shape(self.clip, new, old, advantages, mask)
            old, advantages = shaped.old_logps, shaped.advantages
            stats = None if self.clip_metrics == "none" else shaped.stats
        loss = super().compute_loss_for_module(  # type: ignore[misc]
            module_id=module_id,
            config=_adapter.View(config, clip_param=margin),
            batch={**batch, Columns.ACTION_LOGP: old, Postprocessing.ADVANTAGES: advantages},
            fwd_out=fwd_out,
        )
        self._log(stats, module_id)
        return loss

    def _log(self, stats: ClipStats | None, module_id: str) -> None:
        if stats is not None:
            values = _adapter.chosen_metrics(stats, self.clip_metrics, "clip/")
            self.metrics.log_dict(values, key=module_id, window=1)


class BandPPOTorchLearner(BandLearnerMixin, PPOTorchLearner):
    """RLlib's PPO learner under any clip: ``config.training(learner_class=BandPPOTorchLearner)``."""


def _is_discrete(actions: Any) -> bool:
    """Return whether no part of the actions, which may be nested, is a float."""
    if isinstance(actions, Tensor):
        return not actions.is_floating_point()
    return all(_is_discrete(part) for part in (actions.values() if isinstance(actions, dict) else actions))
