"""verl's PPO loss with per-token bounds: verl's loss is kept, only the settings it clamps with are exchanged."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bandpo import ClipStats, Region, clip_stats
from bandpo._checks import InputError, check_number, nearest
from bandpo.diagnostics import BUCKETS, FIELDS
from bandpo.engines._hosts import HOSTS, LOSS_MODE, TARGET
from bandpo.engines._margins import CLIP, View, make_clip, margins

HOST = HOSTS["verl"]
with HOST.imports():
    import verl
    from verl.trainer.ppo import core_algos
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

_PLACE = "actor_rollout_ref.actor.policy_loss"
_KEYWORDS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip
_NO_DUAL_CLIP = 1e9  # verl has no switch for it; its ratio stops at e^20 < 5e8, so this never cuts
_REPLACED = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
_BY_BUCKET = ("tokens", "zero_grad_below", "zero_grad_above")


@dataclass
class BandLossConfig(PolicyLossConfig):
    """verl's PolicyLossConfig plus the clip; goes to ``actor_rollout_ref.actor.policy_loss._target_``.

    Args:
        loss_mode: must be "bandpo"; verl's own configuration sets "vanilla", so it has to be given.
        clip: name of the clip, as `bandpo.get_clip` takes it: "band", "fixed", "clip-higher", "none", "sides".
        clip_args: that clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: with a negative advantage no gradient above this ratio, > 1; None for off. verl's ``clip_ratio_c``
            is not used: its default 3 would cut into the band.

    Raises:
        InputError: another loss mode, a clip that does not exist or does not take these arguments, a bad dual_clip.
    """

    loss_mode: str = LOSS_MODE
    clip: str = CLIP
    clip_args: dict[str, Any] | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Check the options and make the clip; see the class."""
        if self.loss_mode != LOSS_MODE:
            raise InputError(
                f"loss_mode={self.loss_mode!r}: must be {LOSS_MODE!r} with {TARGET}, every other loss goes round the "
                f"clip{nearest(self.loss_mode, [LOSS_MODE])}; set {_PLACE}.loss_mode={LOSS_MODE}, or drop the _target_"
            )
        if self.dual_clip is not None:
            check_number("dual_clip", self.dual_clip, 1.0, open_low=True)
        self.region: Region = make_clip(self.clip, self.clip_args)
        self.ratio_limit = _NO_DUAL_CLIP if self.dual_clip is None else self.dual_clip
        self.announced = False

    _mutable_fields = PolicyLossConfig._mutable_fields | {"announced"}


class _View(View):
    """verl's actor configuration, which is frozen, with a few settings replaced; verl asks by get() as well."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def band_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Return verl's own clipped loss with the bounds of `config.policy_loss`; registered as loss mode "bandpo".

    Padding is inert whatever it holds, NaN too.

    Args:
        old_log_prob: log-probabilities in the ratio's denominator, shape (batch, token).
        log_prob: log-probabilities under the policy in training, same shape.
        advantages: per token, same shape.
        response_mask: 1 for tokens, 0 for padding, same shape.
        loss_agg_mode: as in verl.
        config: verl's actor configuration, whose `policy_loss` is a `BandLossConfig`.
        rollout_is_weights: as in verl.
        **more: what a later verl gives its losses; passed on.

    Returns:
        verl's loss, and its metrics with those of the clip: ``actor/band/NAME_sum`` and, by bucket of old probability,
        ``actor/band/NAME_sum/BUCKET``. verl averages each over micro-batches and ranks, so a share is one average
        divided by another, e.g. ``zero_grad_above_sum / tokens_sum``; exact where the updates of a rollout have equally
        many micro-batches, which `use_dynamic_bsz` does not promise.

    Raises:
        InputError: the configuration is not one that uses the clip.
    """
    options = _check_config(config)
    tokens = response_mask.bool()
    # 0 * NaN is NaN: verl's sequence modes and its gradients would let padding through.
    old, new, adv = (torch.where(tokens, x, 0.0) for x in (old_log_prob.detach(), log_prob, advantages))
    if rollout_is_weights is not None:
        rollout_is_weights = torch.where(tokens, rollout_is_weights, 0.0)
    eps_low, eps_high = margins(options.region, old)
    view = _View(
        config, clip_ratio=None, clip_ratio_low=eps_low, clip_ratio_high=eps_high, clip_ratio_c=options.ratio_limit
    )
    loss, metrics = core_algos.compute_policy_loss_vanilla(
        old_log_prob=old, log_prob=new, advantages=adv, response_mask=response_mask, loss_agg_mode=loss_agg_mode,
        config=view, rollout_is_weights=rollout_is_weights, **more,
    )  # fmt: skip
    stats = clip_stats(new.detach(), old, adv, tokens, clip=options.region, dual_clip=options.dual_clip)
    return loss, metrics | _metrics(stats)


def _check_config(config: Any) -> BandLossConfig:
    """Return the clip's options; refuse a configuration that sets something that would have no effect."""
    options = config.policy_loss
    if not isinstance(options, BandLossConfig):
        raise InputError(
            f"loss_mode={LOSS_MODE!r} with {type(options).__name__}: must be BandLossConfig; "
            f"set {_PLACE}._target_={TARGET}"
        )
    for f in fields(ActorConfig):
        if f.name in _REPLACED and getattr(config, f.name) != f.default:
            way = f"{_PLACE}.dual_clip" if f.name == "clip_ratio_c" else f"{_PLACE}.clip=fixed with clip_args"
            raise InputError(
                f"actor.{f.name}={getattr(config, f.name)!r}: must be left out, clip={options.clip!r} sets the bounds; "
                f"use {way}"
            )
    if not options.announced:
        options.announced = True
        print(
            f"bandpo: policy loss {LOSS_MODE!r} in use in this worker: {options.region}, "
            f"dual_clip={options.dual_clip}, verl {verl.__version__}",
            flush=True,
        )
    return options


def _metrics(stats: ClipStats) -> dict[str, float]:
    rows = stats.sums.tolist()  # the one host synchronisation
    metrics = {f"actor/band/{name}_sum": sum(row[i] for row in rows) for i, name in enumerate(FIELDS)}
    for name in _BY_BUCKET:
        for bucket, row in zip(BUCKETS, rows, strict=True):
            metrics[f"actor/band/{name}_sum/{bucket}"] = row[FIELDS.index(name)]
    return metrics


def check_seam() -> None:
    """Check that the installed verl has the loss that this adapter calls, and that it clamps with tensors.

    Raises:
        InputError: the loss takes other arguments or does not use the bounds; names the version that is tested.
    """
    vanilla = HOST.find(core_algos, "compute_policy_loss_vanilla")
    missing = [name for name in _KEYWORDS if name not in inspect.signature(vanilla).parameters]
    if missing:
        raise HOST.error(f"its PPO loss no longer takes {', '.join(missing)}")
    for advantage in (1.0, -1.0):
        try:
            kept = _try_bounds(advantage)
        except (AttributeError, AssertionError, TypeError, ValueError) as error:
            raise HOST.error(f"its PPO loss failed a trial, {error!r}") from error
        if kept != [True, False, True, False]:
            raise HOST.error("its PPO loss does not clamp with bounds per token")


def _try_bounds(advantage: float) -> list[bool]:
    """Return which of four tokens keep their gradient in verl's loss: each moved by e^0.7, the 2nd and 4th clipped."""
    old, mask, eps = torch.full((1, 4), -2.0), torch.ones(1, 4), torch.tensor([[2.0, 0.25, 2.0, 0.25]])
    new = (old + 0.7 * advantage).requires_grad_()
    base = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    view = _View(base, clip_ratio=None, clip_ratio_low=eps, clip_ratio_high=eps, clip_ratio_c=_NO_DUAL_CLIP)
    loss, _ = core_algos.compute_policy_loss_vanilla(
        old_log_prob=old, log_prob=new, advantages=advantage * mask, response_mask=mask, loss_agg_mode="token-mean",
        config=view, rollout_is_weights=None,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, new)
    return [value != 0 for value in grad[0].tolist()]


check_seam()
core_algos.register_policy_loss(LOSS_MODE)(band_loss)
