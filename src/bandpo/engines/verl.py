"""verl's PPO loss under any clip: verl's loss is kept, only what it clamps with or weighs by is exchanged.

A hard gate goes as two margins per token, where verl has two numbers. Every other clip goes as advantages c / r per
token, with verl's own clip opened wide; `loss_agg_mode` then only chooses how tokens are averaged.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bandpo import Clip, ClipStats, Fixed, Region, clip_stats
from bandpo._input import InputError, check_number, nearest
from bandpo.clips.base import MOST
from bandpo.clips.cispo import Cispo
from bandpo.clips.covariance import ClipCov, KlCov
from bandpo.clips.dppo import DppoKL, DppoTV
from bandpo.clips.dro import Dro
from bandpo.clips.dual_clip import Dual, DualClip
from bandpo.clips.gmpo import Gmpo
from bandpo.clips.gspo import Gspo
from bandpo.clips.sapo import Sapo
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS, LOSS_MODE, TARGET

HOST = HOSTS["verl"]
with HOST.imports():
    import verl
    from verl.trainer.ppo import core_algos
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

METRICS = "actor/clip/"
_PLACE = "actor_rollout_ref.actor.policy_loss"
_VANILLA = "vanilla"
_KEYWORDS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip
_NO_DUAL_CLIP = 1e9  # verl has no switch for it; its ratio stops at e^20 < 5e8, so this never cuts
_WIDE = {"clip_ratio": None, "clip_ratio_low": 1.0, "clip_ratio_high": math.inf, "clip_ratio_c": _NO_DUAL_CLIP}
_REPLACED = {  # settings of verl's own clips, and what to use instead
    **dict.fromkeys(("clip_ratio", "clip_ratio_low", "clip_ratio_high"), f"{_PLACE}.clip=fixed with clip_args"),
    "clip_ratio_c": f"{_PLACE}.dual_clip",
    **dict.fromkeys(("tau_pos", "tau_neg"), f"{_PLACE}.clip=sapo with clip_args"),
}


@dataclass
class BandLossConfig(PolicyLossConfig):
    """verl's PolicyLossConfig plus the clip; goes to ``actor_rollout_ref.actor.policy_loss._target_``.

    Args:
        loss_mode: must be "bandpo"; verl's own configuration sets "vanilla", so it has to be given.
        clip: the clip: a name or an import path, as `bandpo.get_clip` takes it, or a clip that can be pickled. "host"
            calls verl's own loss `host_loss_mode` as it is, with verl's own settings, and only measures what it does.
        clip_args: that clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: with a negative advantage no gradient above this ratio, > 1; None for off. verl's ``clip_ratio_c``
            is not used: its default 3 would cut into the band.
        clip_metrics: what is logged as ``actor/clip/NAME_sum``: "brief" (nine sums), "full" (by sign of the advantage
            and by bucket of old probability too) or "none".
        host_loss_mode: with ``clip="host"``, the name of a loss that is registered in verl.

    Attributes:
        made: the clip in use; None for "host".

    Raises:
        InputError: another loss mode, a clip that does not exist, does not take these arguments, cannot be pickled or
            needs what verl does not hand to its losses, a bad dual_clip, an option that would have no effect.
    """

    _mutable_fields = PolicyLossConfig._mutable_fields | {"announced"}

    loss_mode: str = LOSS_MODE
    clip: Any = _adapter.CLIP
    clip_args: dict[str, Any] | None = None
    dual_clip: float | None = None
    clip_metrics: str = "brief"
    host_loss_mode: str = _VANILLA

    def __post_init__(self) -> None:
        """Check the options and make the clip; see the class."""
        if self.loss_mode != LOSS_MODE:
            raise InputError(
                f"loss_mode={self.loss_mode!r}: must be {LOSS_MODE!r} with {TARGET}, every other loss goes round the "
                f"clip{nearest(self.loss_mode, [LOSS_MODE])}; set {_PLACE}.loss_mode={LOSS_MODE}, or drop the _target_"
            )
        if self.dual_clip is not None:
            check_number("dual_clip", self.dual_clip, 1.0, open_low=True)
        _adapter.check_how_much(self.clip_metrics)
        self.made = _make_clip(self)
        self.announced = False

    @property
    def keeps_host(self) -> bool:
        """Whether verl's own loss is called as it is."""
        return isinstance(self.clip, str) and self.clip == _adapter.HOST

    def __getstate__(self) -> dict[str, Any]:
        """Return what the user gave: another process makes the clip again, from its file if it has one."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it again; see `__getstate__`."""
        BandLossConfig.__init__(self, **state)


def _check_host(options: BandLossConfig) -> None:
    """Refuse what has no effect when verl's own loss is kept, and losses that verl does not have."""
    for name, instead in (("clip_args", "verl's own settings"), ("dual_clip", "actor.clip_ratio_c")):
        if getattr(options, name):
            raise InputError(
                f"{name}={getattr(options, name)!r} with clip='host': must be left out, verl's own loss is kept; use "
                f"{instead}"
            )
    known = [name for name in core_algos.POLICY_LOSS_REGISTRY if name != LOSS_MODE]
    if options.host_loss_mode not in known:
        raise InputError(
            f"host_loss_mode={options.host_loss_mode!r}: must be a loss that is registered in verl, one of "
            f"{', '.join(known)}{nearest(options.host_loss_mode, known)}; set {_PLACE}.host_loss_mode"
        )


def _make_clip(options: BandLossConfig) -> Clip | None:
    """Return the clip that the options name; None where verl's own loss is kept."""
    if options.keeps_host:
        _check_host(options)
        return None
    if options.host_loss_mode != _VANILLA:
        raise InputError(
            f"host_loss_mode={options.host_loss_mode!r} with clip={options.clip!r}: must be left out, it is for "
            "clip='host', which keeps a loss of verl's"
        )
    clip, arguments = _plain(options.clip), _plain(options.clip_args)
    made = _adapter.make_clip(clip, arguments)
    _adapter.check_kept(clip, arguments)
    _adapter.refuse_needs(made, (), "verl")
    return made


def _plain(x: Any) -> Any:
    """Return the mappings and lists of verl's configuration as Python's own."""
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, Sequence) and not isinstance(x, str | tuple) else x


def clip_of(config: Any) -> Clip | None:
    """Return which clip of ours the settings of a verl loss are.

    Args:
        config: verl's actor configuration. Its `policy_loss` says the loss: by `host_loss_mode` where that is a
            `BandLossConfig` with clip "host", else by `loss_mode`.

    Returns:
        The clip; None for a loss that has none in the registry, or settings that no clip of ours takes.
    """
    options = config.policy_loss
    mode = options.host_loss_mode if isinstance(options, BandLossConfig) and options.keeps_host else options.loss_mode
    try:
        return _CLIPS[mode](config) if mode in _CLIPS else None
    except InputError:
        return None


def _settings_of(config: Any) -> tuple[float, float]:
    """Return verl's two settings, which are margins, radii or margins of log r, whatever the loss takes them for."""
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    return low, high


def _margins_of(config: Any) -> tuple[float, float]:
    """Return them as margins of the ratio: above 1 verl clamps below 0, which is no bound either."""
    low, high = _settings_of(config)
    return min(low, 1.0), high


def _vanilla_of(config: Any) -> Clip:
    cap = config.get("clip_ratio_c", 3.0)
    return Fixed(*_margins_of(config)) if cap > math.exp(MOST) else DualClip(*_margins_of(config), cap=cap)


def _dppo_of(kind: type[DppoTV], config: Any) -> Clip:
    """Return DPPO: its settings are radii, and verl's dual clip is the ceiling of its weight."""
    low, high = _settings_of(config)
    return kind(delta=low if low == high else (low, high), cap=config.get("clip_ratio_c", 20.0))


def _clip_cov_of(config: Any) -> Clip:
    """Return Clip-Cov, which drops as many tokens as verl's, though not the same ones: verl draws them."""
    given = config.policy_loss
    return ClipCov(*_margins_of(config), fraction=given.clip_cov_ratio, low=given.clip_cov_lb, high=given.clip_cov_ub)


_CLIPS: dict[str, Callable[[Any], Clip]] = {  # by verl's name of the loss
    _VANILLA: _vanilla_of,
    "dppo_tv": partial(_dppo_of, DppoTV),
    "dppo_kl": partial(_dppo_of, DppoKL),
    "sapo": lambda config: Sapo(config.tau_pos, config.tau_neg),
    "gspo": lambda config: Gspo(*_margins_of(config)),
    "cispo": lambda config: Cispo(*_margins_of(config)),
    "geo_mean": lambda config: Gmpo(*_settings_of(config)),
    "dro": lambda config: Dro(config.policy_loss.dro_beta),
    "kl_cov": lambda config: KlCov(config.policy_loss.kl_cov_ratio, config.policy_loss.ppo_kl_coef),
    "clip_cov": _clip_cov_of,
}


class _View(_adapter.View):
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
    """Return verl's own loss under the clip of `config.policy_loss`; registered as loss mode "bandpo".

    Padding is inert whatever it holds, NaN too, unless verl's own loss is kept (clip "host").

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
        verl's loss, and its metrics with those of the clip, ``actor/clip/NAME_sum``. verl averages each over
        micro-batches and ranks, so a share is one average divided by another, e.g. ``zero_grad_above_sum /
        tokens_sum``; exact where the updates of a rollout have equally many micro-batches, which `use_dynamic_bsz` does
        not promise. For a clip that is no region ``actor/pg_clipfrac`` is the share of tokens without a gradient, and
        there is no ``actor/pg_clipfrac_lower``.

    Raises:
        InputError: the configuration is not one that uses the clip.
    """
    options = _check_config(config)
    given = {"old_log_prob": old_log_prob, "log_prob": log_prob, "advantages": advantages}
    rest = {"response_mask": response_mask, "loss_agg_mode": loss_agg_mode, **more}
    if options.keeps_host:
        own = core_algos.get_policy_loss_fn(options.host_loss_mode)
        loss, metrics = own(**given, **rest, config=config, rollout_is_weights=rollout_is_weights)
        return loss, metrics | _measured(options, clip_of(config), log_prob, old_log_prob, advantages, response_mask)
    tokens = response_mask.bool()
    # 0 * NaN is NaN: verl's sequence modes and its gradients would let padding through.
    old, new, adv = (torch.where(tokens, x, 0.0) for x in (old_log_prob.detach(), log_prob, advantages))
    if rollout_is_weights is not None:
        rest["rollout_is_weights"] = torch.where(tokens, rollout_is_weights, 0.0)
    assert options.made is not None
    if _adapter.by_margins(options.made):
        return _by_margins(options, options.made, config, (new, old, adv, tokens), rest)
    clip = options.made if options.dual_clip is None else Dual(options.made, options.dual_clip)
    return _by_advantages(options, clip, config, (new, old, adv, tokens), rest)


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # logps, old_logps, advantages, mask
_Result = tuple[Tensor, dict[str, Any]]


def _by_margins(options: BandLossConfig, clip: Region, config: Any, t: _Tensors, rest: dict[str, Any]) -> _Result:
    """Return verl's loss with the bounds of a region in the place of its two margins."""
    low, high = _adapter.margins(clip, t[1])
    cap = _NO_DUAL_CLIP if options.dual_clip is None else options.dual_clip
    loss, metrics = _vanilla(config, *t[:3], clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=cap, **rest)
    return loss, metrics | _measured(options, clip, *t)


def _by_advantages(options: BandLossConfig, clip: Clip, config: Any, t: _Tensors, rest: dict[str, Any]) -> _Result:
    """Return verl's loss, its own clip opened wide, with c / r in the place of its advantages."""
    shaped = _adapter.shape(clip, *t)
    loss, metrics = _vanilla(config, t[0], shaped.old_logps, shaped.advantages, **rest)
    # With its clip wide open verl's own counts are 0: the first becomes the share without a gradient, the other goes.
    metrics.pop("actor/pg_clipfrac_lower", None)
    if options.clip_metrics == "none":
        return loss, metrics | {"actor/pg_clipfrac": float(shaped.zero_grad)}
    sums = _adapter.as_sums(shaped.stats)
    shut = sums["zero_grad_below_sum"] + sums["zero_grad_above_sum"]
    metrics["actor/pg_clipfrac"] = shut / max(sums["tokens_sum"], 1.0)
    return loss, metrics | _adapter.chosen_sums(sums, options.clip_metrics, METRICS)


def _vanilla(config: Any, new: Tensor, old: Tensor, advantages: Tensor, **rest: Any) -> _Result:
    """Return verl's own PPO loss with its clip settings replaced; without any given its clip is wide open."""
    view = _View(config, **{name: rest.pop(name, value) for name, value in _WIDE.items()})
    named = {"rollout_is_weights": None, **rest, "config": view, "advantages": advantages}
    return core_algos.compute_policy_loss_vanilla(old_log_prob=old, log_prob=new, **named)  # type: ignore[no-any-return]


def _measured(options: BandLossConfig, clip: Clip | None, new: Tensor, old: Tensor, *rest: Tensor) -> dict[str, float]:
    """Return what a clip did, as sums; nothing where that is not asked for, or there is no clip."""
    if clip is None or options.clip_metrics == "none":
        return {}
    stats: ClipStats = clip_stats(new.detach(), old, *rest, clip=clip, dual_clip=options.dual_clip)
    return _adapter.chosen_sums(_adapter.as_sums(stats), options.clip_metrics, METRICS)


def _check_config(config: Any) -> BandLossConfig:
    """Return the clip's options; refuse a configuration that sets something that would have no effect."""
    options = config.policy_loss
    if not isinstance(options, BandLossConfig):
        raise InputError(
            f"loss_mode={LOSS_MODE!r} with {type(options).__name__}: must be BandLossConfig; "
            f"set {_PLACE}._target_={TARGET}"
        )
    for f in () if options.keeps_host else fields(ActorConfig):
        if f.name in _REPLACED and getattr(config, f.name) != f.default:
            raise InputError(
                f"actor.{f.name}={getattr(config, f.name)!r}: must be left out, clip={options.clip!r} replaces it; "
                f"use {_REPLACED[f.name]}, or keep verl's with {_PLACE}.clip=host"
            )
    if not options.announced:
        options.announced = True
        kept = f"verl's own {options.host_loss_mode!r}, measured as {clip_of(config)}"
        print(
            f"bandpo: policy loss {LOSS_MODE!r} in use in this worker: {kept if options.keeps_host else options.made}, "
            f"dual_clip={options.dual_clip}, verl {verl.__version__}",
            flush=True,
        )
    return options


def check_seam() -> None:
    """Check that the installed verl has the loss that this adapter calls, and that it clamps and weighs with tensors.

    Raises:
        InputError: the loss takes other arguments or does not use what it is given; names the version that is tested.
    """
    vanilla = HOST.find(core_algos, "compute_policy_loss_vanilla")
    missing = [name for name in _KEYWORDS if name not in inspect.signature(vanilla).parameters]
    if missing:
        raise HOST.error(f"its PPO loss no longer takes {', '.join(missing)}")
    eps = torch.tensor([[2.0, 0.25, 2.0, 0.25]])  # the 2nd and 4th of four tokens are clipped
    for advantage in (1.0, -1.0):
        try:
            clipped = _try(advantage, clip_ratio_low=eps, clip_ratio_high=eps)
            free = _try(advantage)
        except (AttributeError, AssertionError, TypeError, ValueError) as error:
            raise HOST.error(f"its PPO loss failed a trial, {error!r}") from error
        if [x != 0 for x in clipped] != [True, False, True, False]:
            raise HOST.error("its PPO loss does not clamp with bounds per token")
        want = [-advantage * weight * math.exp(0.7 * advantage) / 4 for weight in (1, 2, 3, 4)]
        if any(abs(x - y) > 1e-5 * abs(y) for x, y in zip(free, want, strict=True)):
            raise HOST.error("its PPO loss does not weigh the ratio by advantages per token")


def _try(advantage: float, **settings: Any) -> list[float]:
    """Return the gradient of verl's loss at four tokens, each moved by e^0.7 in the direction of its advantage."""
    old, mask, weights = torch.full((1, 4), -2.0), torch.ones(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    new = (old + 0.7 * advantage).requires_grad_()
    base = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    loss, _ = _vanilla(base, new, old, advantage * weights, response_mask=mask, loss_agg_mode="token-mean", **settings)
    (grad,) = torch.autograd.grad(loss, new)
    return grad[0].tolist()  # type: ignore[no-any-return]


check_seam()
core_algos.register_policy_loss(LOSS_MODE)(band_loss)
