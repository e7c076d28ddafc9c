"""The options of the TRL adapter: TRL's own plus the clip, and what is refused beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bandpo import Clip, Fixed, Region, Tokens
from bandpo._input import InputError, check_number, nearest
from bandpo.clips.base import take_after
from bandpo.clips.cispo import Cispo
from bandpo.clips.dual_clip import DualClip
from bandpo.clips.gspo import Gspo
from bandpo.clips.sapo import Sapo
from bandpo.clips.vespo import Vespo
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

with HOSTS["trl"].imports():
    import trl
    from trl import GRPOConfig, GRPOTrainer

_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # -r A, clamped; each averages in its own way
# loss_type: our clip, the same average
_CLIPS_OF_THEIR_OWN = {"cispo": ("cispo", "dapo"), "sapo": ("sapo", "grpo"), "vespo": ("vespo", "dapo")}


@dataclass
class BandGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig plus the clip.

    Args:
        clip: the clip: a name or an import path, as `bandpo.get_clip` takes it, or a clip that can be pickled. "host"
            leaves TRL's own loss as it is and only measures what its clip does.
        clip_args: that clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``; a JSON string on a command line.
        clip_anchor: which old policy the clip measures from: "old", or "p", "r" or "both" for vLLM's
            log-probabilities; see `bandpo.clips.anchored`.
        clip_metrics: what is logged as ``clip/NAME``: "brief" (nine numbers), "full" (by sign of the advantage and by
            bucket of old probability too) or "none".

    Raises:
        InputError: the clip does not exist or does not take these arguments, or an option is set with which TRL would
            not use the clip.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "clip_args"]

    clip: str = field(default=_adapter.CLIP, metadata={"help": "Clip: a name of `bandpo clips`, or 'host' for TRL's."})
    clip_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the clip, a dict or JSON."})
    clip_anchor: str = field(
        default="old", metadata={"help": "Old policy the clip measures from: 'old', or 'p', 'r', 'both' for vLLM's."}
    )
    clip_metrics: str = field(default="brief", metadata={"help": "Metrics of the clip: 'brief', 'full' or 'none'."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses in the log. Training stops at them anyway."}
    )

    def __post_init__(self) -> None:
        """Check the options; see the class."""
        super().__post_init__()
        check_options(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as TRL does, objects in `clip` and `clip_args` by what they print as."""
        return super().to_dict() | {"clip": _plain(self.clip), "clip_args": _plain(self.clip_args)}


def _plain(x: Any) -> Any:
    """Return what JSON and trackers can hold."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return x if x is None or isinstance(x, str | int | float | bool) else repr(x)


def clip_of(config: GRPOConfig) -> Clip | None:
    """Return which clip of ours a TRL configuration's own settings are.

    Args:
        config: a GRPOConfig.

    Returns:
        The clip; None for a loss that has none in the registry.
    """
    low = min(config.epsilon, 1.0)  # no ratio is below 0
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    sequence = config.importance_sampling_level == "sequence"
    if config.loss_type == "vespo" and not (config.use_vllm and config.vllm_importance_sampling_correction):
        return Vespo(config.vespo_k_pos, config.vespo_lambda_pos, config.vespo_k_neg, config.vespo_lambda_neg)
    if config.loss_type == "cispo" and not sequence and high >= 0:
        return Cispo(None, high - 1)  # TRL's epsilon_high is the ceiling itself
    if config.loss_type == "sapo" and not sequence:
        return Sapo(config.sapo_temperature_pos, config.sapo_temperature_neg)
    if config.loss_type not in _LOSSES or min(low, high) < 0 or (sequence and config.delta is not None):
        return None
    if sequence:
        return Gspo(low, high)
    if config.delta is None:
        return Fixed(low, high)
    # TRL clamps r before it looks at the sign; where A < 0 its clipped term goes on to 1 + epsilon_high
    return DualClip(low, min(high, config.delta - 1), cap=max(config.delta, 1 + high))


class Below(Clip):
    """A region's clip beside TRL's `delta`: no gradient above it for A > 0, nor for A < 0 where the region ends too."""

    def __init__(self, clip: Clip, delta: float) -> None:
        self.clip, self.delta = clip, delta
        take_after(self, clip)
        self.name = clip.name  # type: ignore[misc]

    @property
    def boundary(self) -> Region | None:
        """The region of the clip."""
        return self.clip.boundary

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return the clip's c, or 0 where TRL's min(min(r, delta) A, clip(r) A) is constant."""
        over, region = tokens.rise > self.delta - 1, self.boundary
        if region is not None:
            over = over & ((tokens.advantages > 0) | (region.side(tokens) > 0))
        return torch.where(over, 0.0, self.clip.coefficient(tokens))


def make_clip(args: BandGRPOConfig) -> Clip | None:
    """Return the clip in use; for "host" TRL's own, as far as the registry has it."""
    if args.clip == _adapter.HOST:
        for name, default in (("clip_args", None), ("clip_anchor", "old")):
            if (getattr(args, name) or None) not in (None, default):
                raise InputError(
                    f"{name}={getattr(args, name)!r} with clip='host': must be left out, TRL's own settings hold"
                )
        return clip_of(args)
    _adapter.check_kept(args.clip, args.clip_args)  # type: ignore[arg-type]  # a string has been parsed by now
    return _adapter.make_clip(args.clip, args.clip_args, args.clip_anchor, scheduled=True)  # type: ignore[arg-type]


def check_options(args: BandGRPOConfig) -> None:
    """Refuse every option with which TRL would silently not use the clip."""
    if not isinstance(args, BandGRPOConfig):
        raise InputError(f"args={type(args).__name__}: must be BandGRPOConfig, which takes all fields of GRPOConfig")
    _adapter.check_how_much(args.clip_metrics)
    if args.delta is not None and check_number("delta", args.delta, 0.0) <= 1:
        raise InputError(
            f"delta={args.delta!r}: is TRL's ceiling of the ratio, must be above 1; for the radius of the trust region "
            f"write clip_args={{'delta': {args.delta!r}}}"
        )
    clip = make_clip(args)
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise InputError(
            f"use_liger_kernel=True: must be False with trl {trl.__version__}, whose Liger loss goes round the clip; "
            "drop it, or pip install -U 'trl>=1.14'"
        )
    if args.clip != _adapter.HOST:
        assert clip is not None
        clip = clip.at(0.0)
        _check_loss(args)
        if not _adapter.by_margins(clip):
            _check_shaped(args, clip)
        if args.clip_anchor in ("r", "both") and args.use_vllm and args.vllm_importance_sampling_correction:
            raise InputError(
                f"vllm_importance_sampling_correction=True with clip_anchor={args.clip_anchor!r}: both weigh by old / "
                "rollout; must be False, or give clip_anchor='p'"
            )


def _check_loss(args: BandGRPOConfig) -> None:
    """Refuse TRL's own clips beside ours."""
    keep = "or keep TRL's with clip='host'"
    if args.loss_type in _CLIPS_OF_THEIR_OWN:
        clip, average = _CLIPS_OF_THEIR_OWN[args.loss_type]
        raise InputError(
            f"loss_type={args.loss_type!r}: is a clip of its own, beside clip={args.clip!r}; must be one of "
            f"{', '.join(_LOSSES)}, which choose how tokens are averaged: give clip={clip!r} and "
            f"loss_type={average!r}, {keep}"
        )
    if args.loss_type not in _LOSSES:
        raise InputError(
            f"loss_type={args.loss_type!r}: must be one of {', '.join(_LOSSES)}{nearest(args.loss_type, _LOSSES)}, "
            f"which clip a token's ratio; choose one, {keep}"
        )
    if args.importance_sampling_level != "token":
        raise InputError(
            f"importance_sampling_level={args.importance_sampling_level!r}: must be 'token'; for GSPO, which this is, "
            f"give clip='gspo', {keep}"
        )
    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.name in ("epsilon", "epsilon_high")}
    _adapter.refuse_replaced(args, defaults, args.clip)


def _check_shaped(args: BandGRPOConfig, clip: Clip) -> None:
    """Refuse what reads the advantages' sign or size, or clamps the ratio again, when they are c / r."""
    refused = []
    if args.delta is not None:
        refused.append(
            ("delta", "clamps the ratio again; drop it, or give clip='dual_clip' with clip_args={'cap': ...}")
        )
    if args.off_policy_mask_threshold is not None and clip.opposes:
        refused.append(("off_policy_mask_threshold", "reads the sign of A, which this clip may turn; drop it"))
    if clip.looks_at == "sequence":
        per_token = "acts on single tokens, and this clip on sequences"
        if args.top_entropy_quantile < 1:
            refused.append(("top_entropy_quantile", f"{per_token}; drop it"))
        if args.use_bias_correction_kl and args.beta != 0:
            refused.append(("use_bias_correction_kl", f"{per_token}; drop it"))
        mode = getattr(args, "vllm_importance_sampling_mode", "")
        if args.use_vllm and args.vllm_importance_sampling_correction and mode.startswith("token"):
            refused.append(
                ("vllm_importance_sampling_mode", f"{per_token}; give 'sequence_mask' or 'sequence_truncate'")
            )
    for name, why in refused:
        raise InputError(f"{name}={getattr(args, name)!r} with clip={args.clip!r}: must be left out, it {why}")
    has = ["entropies", *(["rollout_logps"] if args.use_vllm else [])]
    _adapter.refuse_needs(clip, has, "TRL" if args.use_vllm else "TRL without vLLM")
