"""slime's policy loss by its inputs and outputs: it has no package, and the whole of it needs Megatron."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def policy_loss_function(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """`logits` stands for the log-probabilities that slime makes from them."""
    advantages, log_probs = torch.cat(batch["advantages"]), logits
    old_log_probs = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old_log_probs = torch.cat(old_log_probs) if old_log_probs else log_probs.detach()
    ppo_kl = old_log_probs - log_probs
    pg_loss, clipped = compute_policy_loss(
        ppo_kl, advantages, args.eps_clip, args.eps_clip_high, eps_clip_c=args.eps_clip_c
    )
    if args.use_tis:
        pg_loss = pg_loss * torch.exp(old_log_probs - torch.cat(batch["rollout_log_probs"]))
    metrics = {"pg_clipfrac": clipped, "ppo_kl": ppo_kl}
    return sum_of_sample_mean(pg_loss), {key: sum_of_sample_mean(x).detach() for key, x in metrics.items()}


def compute_policy_loss(
    ppo_kl: Tensor, advantages: Tensor, eps_clip: Any, eps_clip_high: Any, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    ratio = (-ppo_kl).exp()
    free, clamped = -ratio * advantages, -ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages
    loss = torch.maximum(free, clamped)
    if eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(-eps_clip_c * advantages, loss), loss)
    return loss, (clamped > free).float()
