"""RLlib's PPO learner (new API stack, torch) with bounds per action; tested with ray 2.60.0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bandpo import clip_stats
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import (
    CLIP,
    View,
    make_clip,
    margins,
    overall,
    refuse_density,
    refuse_replaced,
    refuse_strays,
)

HOST = HOSTS["rllib"]
with HOST.imports():
    from ray.rllib.algorithms.ppo.ppo import PPOConfig
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.core.columns import Columns
    from ray.rllib.evaluation.postprocessing import Postprocessing

_SEAM = ("torch.clamp(logp_ratio, 1 - config.clip_param, 1 + config.clip_param)", "- batch[Columns.ACTION_LOGP]")


def check_seam() -> None:
    """Check that the installed RLlib still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(PPOTorchLearner, "compute_loss_for_module", _SEAM)


class _Margin:
    """Stands where RLlib has one number for both sides; gives each side its own margin."""

    def __init__(self, eps_low: Tensor, eps_high: Tensor) -> None:
        self.eps_low, self.eps_high = eps_low, eps_high

    def __rsub__(self, one: float) -> Tensor:
        return one - self.eps_low

    def __radd__(self, one: float) -> Tensor:
        return one + self.eps_high


class BandLearnerMixin:
    """Gives a PPO learner per-action bounds; put it before the learner among the bases.

    Options come from ``config.learners(learner_config_dict={"clip": "band", "clip_args": {"delta": 0.05}})``. RLlib's
    result of a module has the clip's metrics as ``clip/NAME``, of the last minibatch.

    Raises:
        InputError: when it is built: bad clip, `clip_param` set as well, actions that are not discrete, or RLlib has
            changed.
    """

    config: Any
    module: Any
    metrics: Any

    def build(self) -> None:
        """Check that the clip will be used, then build RLlib's learner."""
        check_seam()
        options = self.config.learner_config_dict
        refuse_strays("learner_config_dict", options)  # it may hold more, for a learner of your own
        clip = options.get("clip", CLIP)
        self.clip = make_clip(clip, options.get("clip_args"))
        refuse_replaced(self.config, {"clip_param": PPOConfig().clip_param}, clip)
        super().build()  # type: ignore[misc]

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Any:
        """Return RLlib's own loss, computed with the margins of this batch."""
        old, mask = batch[Columns.ACTION_LOGP], batch.get(Columns.LOSS_MASK)
        advantages = batch[Postprocessing.ADVANTAGES]
        if mask is not None:  # RLlib drops padding after the ratio, where NaN has reached the gradient
            old, advantages = torch.where(mask, old, 0.0), torch.where(mask, advantages, 0.0)
            batch = {**batch, Columns.ACTION_LOGP: old, Postprocessing.ADVANTAGES: advantages}
        module = self.module[module_id].unwrapped()
        if batch[Columns.ACTIONS].is_floating_point():
            refuse_density(self.clip, "actions are not discrete")
        view = View(config, clip_param=_Margin(*margins(self.clip, old)))
        loss = super().compute_loss_for_module(  # type: ignore[misc]
            module_id=module_id, config=view, batch=batch, fwd_out=fwd_out
        )
        with torch.no_grad():
            dist = module.get_train_action_dist_cls().from_logits(fwd_out[Columns.ACTION_DIST_INPUTS])
            stats = clip_stats(dist.logp(batch[Columns.ACTIONS]), old, advantages, mask, clip=self.clip)
        self.metrics.log_dict(overall(stats.metrics(), "clip/"), key=module_id, window=1)
        return loss


class BandPPOTorchLearner(BandLearnerMixin, PPOTorchLearner):
    """RLlib's PPO learner with per-action bounds: ``config.training(learner_class=BandPPOTorchLearner)``."""
