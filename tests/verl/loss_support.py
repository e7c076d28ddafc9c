"""What tests of the loss share: a batch, verl's actor configuration, and a loss called as verl calls it."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPActorConfig
from verl.workers.config.actor import PolicyLossConfig

from bandpo.engines.verl import LOSS_MODE, METRICS, TARGET

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
OFF = 1e9  # verl's dual clip, out of reach


def make_batch(rows: int = 64, width: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities of sampled tokens under two softmax policies, float64."""
    torch.manual_seed(seed)
    logits = 2 * torch.randn(rows, width, 12, dtype=torch.float64)
    old, new = (x.log_softmax(-1) for x in (logits, logits + 0.8 * torch.randn_like(logits)))
    token = torch.distributions.Categorical(logits=old).sample()[..., None]
    advantages = torch.randn(rows, 1, dtype=torch.float64).expand(rows, width).clone()
    mask = torch.rand(rows, width) > 0.2
    names = ("old_log_prob", "log_prob", "advantages", "response_mask")
    return dict(
        zip(names, (old.gather(-1, token)[..., 0], new.gather(-1, token)[..., 0], advantages, mask), strict=True)
    )


def actor(policy_loss: PolicyLossConfig | None = None, **settings: Any) -> FSDPActorConfig:
    """verl's actor configuration as its workers have it, with what they learn about the whole batch."""
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss or PolicyLossConfig(),
        **settings,
    )  # fmt: skip
    config.global_batch_info.update(dp_size=2, batch_num_tokens=1000, global_batch_size=100, loss_scale_factor=None)
    return config


def run(mode: str, config: Any, batch: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Loss, gradient and metrics of a registered loss, called as verl calls it."""
    logps = batch["log_prob"].clone().requires_grad_()
    arguments: dict[str, Any] = {"loss_agg_mode": "token-mean", "rollout_is_weights": None} | more
    loss, metrics = core_algos.get_policy_loss_fn(mode)(**(batch | {"log_prob": logps}), config=config, **arguments)
    loss.backward()
    assert logps.grad is not None
    return loss.detach(), logps.grad, metrics


def share(metrics: dict[str, Any], name: str = "zero_grad") -> float:
    """The share of tokens that sums stand for; "zero_grad" is that of both sides."""
    names = (f"{name}_below", f"{name}_above") if name == "zero_grad" else (name,)
    return sum(metrics[f"{METRICS}{x}_sum"] for x in names) / metrics[f"{METRICS}tokens_sum"]


def through_hydra(**fields: Any) -> Any:
    """As each of verl's workers makes its configuration."""
    return omega_conf_to_dataclass(OmegaConf.create({"_target_": TARGET, "loss_mode": LOSS_MODE, **fields}))
