"""TRL's GRPO trainer with per-token bounds: TRL's loss is kept, only the two numbers it clamps with are exchanged."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bandpo import Band, ClipStats, clip_stats
from bandpo._checks import InputError, nearest
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import CLIP, as_floats, make_clip, refuse_replaced

HOST = HOSTS["trl"]
with HOST.imports():
    import transformers
    import trl
    from packaging.version import Version
    from trl import GRPOConfig, GRPOTrainer

_RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_LOSSES = (*_RATIO_LOSSES, "cispo")
_SEAM = ("(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)", "(coef_1, max=self.epsilon_high)")
_REMEDY = {
    "logps": "try a lower learning_rate, or float32 (bf16=False, fp16=False)",
    "loss": "try a lower learning_rate, fewer updates a rollout or delta=10 (caps the ratio); check the rewards",
    "gradient": "try a lower learning_rate, or float32 (bf16=False, fp16=False)",
}


class NonFiniteError(FloatingPointError):
    """A NaN or an infinity in loss, log-probabilities or gradient; raised before it can reach the weights."""


def check_seam() -> None:
    """Check that the installed TRL clamps where this adapter puts its bounds.

    Raises:
        InputError: TRL or transformers is too old, or the clamp has moved; names the version that is tested.
    """
    # Older TRL normalises some losses otherwise; older transformers has no _get_grad_norm, which the guard needs.
    for name, version, least in (("trl", trl.__version__, "1.10"), ("transformers", transformers.__version__, "5.3")):
        if Version(version) < Version(least):
            raise InputError(f"{name}=={version}: must be at least {least}; pip install -U '{name}>={least}'")
    HOST.check_source(GRPOTrainer, "_compute_loss", _SEAM)


@dataclass
class BandGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig plus the clip.

    Args:
        clip: name of the clip, as `bandpo.get_clip` takes it: "band", "fixed", "clip-higher", "none".
        clip_args: that clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``; a JSON string on a command line.

    Raises:
        InputError: the clip does not exist or does not take these arguments, or an option is set with which TRL would
            not use the clip.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "clip_args"]

    clip: str = field(default=CLIP, metadata={"help": "Clip: 'band', 'fixed', 'clip-higher' or 'none'."})
    clip_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the clip, a dict or JSON."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses in the log. Training stops at them anyway."}
    )

    def __post_init__(self) -> None:
        """Check the options; see the class."""
        super().__post_init__()
        _check_options(self)


def _make_clip(args: BandGRPOConfig) -> Any:
    if not isinstance(args.clip, str):
        raise InputError(f"clip={args.clip!r}: must be a name; to use a clip object set trainer.clip")
    return make_clip(args.clip, args.clip_args)  # type: ignore[arg-type]  # a string has been parsed by now


def _check_options(args: BandGRPOConfig) -> None:
    """Refuse every option with which TRL would silently not use the clip."""
    if not isinstance(args, BandGRPOConfig):
        raise InputError(f"args={type(args).__name__}: must be BandGRPOConfig, which takes all fields of GRPOConfig")
    _make_clip(args)
    if args.loss_type not in _LOSSES:
        raise InputError(
            f"loss_type={args.loss_type!r}: must be one of {', '.join(_LOSSES)}{nearest(args.loss_type, _LOSSES)}, "
            "which clip a token's ratio; choose one, or use TRL's GRPOTrainer"
        )
    if args.importance_sampling_level != "token":
        raise InputError(
            f"importance_sampling_level={args.importance_sampling_level!r}: must be 'token', bounds are per token; "
            "drop it, or use TRL's GRPOTrainer"
        )
    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.name in ("epsilon", "epsilon_high")}
    refuse_replaced(args, defaults, args.clip)
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise InputError(
            f"use_liger_kernel=True: must be False with trl {trl.__version__}, whose Liger loss goes round the clip; "
            "drop it, or pip install -U 'trl>=1.14'"
        )


def _warn_if_idle(args: BandGRPOConfig) -> None:
    """Warn when each rollout feeds a single optimizer step: then every ratio is 1."""
    accumulate, per_rollout = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    if accumulate % per_rollout == 0:
        warnings.warn(
            f"num_iterations={args.num_iterations}, steps_per_generation={args.steps_per_generation}, "
            f"gradient_accumulation_steps={accumulate}: each rollout feeds one optimizer step, so every ratio is 1 and "
            f"no clip can act; set steps_per_generation={4 * accumulate} for 4 updates a rollout, or num_iterations=2",
            UserWarning,
            stacklevel=3,
        )


class _Edge:
    """Stands where TRL has a scalar epsilon; gives the exact bound, and knows whether it was asked."""

    def __init__(self, bound: Tensor | float) -> None:
        self.bound = bound
        self.uses = 0

    def _use(self, one: object) -> Tensor | float:
        if one != 1:
            raise HOST.error("its GRPO loss uses epsilon in a new way")
        self.uses += 1
        return self.bound


class _Low(_Edge):
    def __rsub__(self, one: object) -> Tensor | float:
        return self._use(one)


class _High(_Edge):
    def __radd__(self, one: object) -> Tensor | float:
        return self._use(one)


class BandGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer whose clip has bounds per token.

    TRL computes ``min(r A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)``; here the two bounds come from
    `args.clip`, made from the log-probabilities in the ratio's denominator. All else is TRL's.

    Args:
        model: as in TRL's GRPOTrainer.
        reward_funcs: as in TRL's GRPOTrainer.
        args: a BandGRPOConfig; None for its defaults.
        *rest: TRL's further arguments.
        **named: TRL's further arguments by name.

    Attributes:
        clip: the clip in use; another `bandpo.Region` may be put in its place before training.
        token_callback: None or ``f(logps, old_logps, advantages, mask)``, called with detached (batch, token) tensors
            at each training micro-batch whose rollout feeds more than one update.

    Raises:
        InputError: an option is set with which TRL would not use the clip, or TRL's loss has changed.
        NonFiniteError: during training, at the first NaN or infinity in loss, log-probabilities or gradient.
    """

    epsilon_low: Any
    epsilon_high: Any
    _tag_names = ["trl", "grpo", "bandpo"]
    _name = "BandPO"
    _paper = {
        "title": "BandPO: Bridging Trust Regions and Ratio Clipping via Probability-Aware Bounds for LLM Reinforcement "
        "Learning",
        "id": "2603.04918",
        "citation": textwrap.dedent("""\
            @article{li2026bandpo,
                title        = {{BandPO: Bridging Trust Regions and Ratio Clipping via Probability-Aware Bounds for LLM Reinforcement Learning}},
                author       = {Yuan Li and Bo Wang and Yufei Gao and Yuqian Yao and Xinyuan Wang and Zhangyue Yin and Xipeng Qiu},
                year         = 2026,
                eprint       = {arXiv:2603.04918},
            }"""),  # noqa: E501
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: BandGRPOConfig | None = None, *rest: Any, **named: Any
    ) -> None:
        """Check that the clip will be used, then build TRL's trainer; see the class."""
        if any("Unsloth" in base.__name__ for base in type(self).__mro__):  # before the seam, which it has not
            raise InputError("GRPOTrainer is Unsloth's, whose loss goes round the clip: must be TRL's; drop unsloth")
        check_seam()
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = BandGRPOConfig(f"{name.split('/')[-1]}-BandPO")
        _check_options(args)
        _warn_if_idle(args)
        if args.clip != Band.name:  # the model card names what was really used
            self._name, self._paper, self._tag_names = GRPOTrainer._name, GRPOTrainer._paper, GRPOTrainer._tag_names
        super().__init__(model, reward_funcs, args, *rest, **named)
        self.clip = _make_clip(args)
        self.token_callback: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
        self._logps: Tensor | None = None
        self._stats: ClipStats | None = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **named)
        self._logps = result[0].detach()  # TRL keeps them to itself; the metrics and the guard need them
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        old = inputs.get("old_per_token_logps")
        # Without old log-probabilities TRL's ratio is exactly 1, and no bound may touch it.
        bounds = None if old is None else self.clip.bounds(old)
        low, high = _Low(0.0 if bounds is None else bounds.low), _High(math.inf if bounds is None else bounds.high)
        scalars = self.epsilon_low, self.epsilon_high
        self._logps = None
        try:
            # CISPO takes the ratio's cap itself, not a margin to add to 1.
            self.epsilon_low, self.epsilon_high = low, high.bound if self.loss_type == "cispo" else high
            loss = super()._compute_loss(model, inputs)
        finally:
            self.epsilon_low, self.epsilon_high = scalars
        if self._logps is None or (self.loss_type in _RATIO_LOSSES and not (low.uses and high.uses)):
            raise HOST.error("its GRPO loss went round the clip")
        self._after_loss(loss.detach(), self._logps, old, inputs)
        return loss

    def _after_loss(self, loss: Tensor, logps: Tensor, old: Tensor | None, inputs: dict[str, Any]) -> None:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        self._check_finite(loss, logps, mask.bool())
        if not self.model.training:
            return
        advantages = inputs["advantages"]
        advantages = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)).expand_as(logps)
        stats = clip_stats(logps, logps if old is None else old, advantages, mask, clip=self.clip)
        self._stats = stats if self._stats is None else self._stats + stats
        if self.token_callback is not None and old is not None:
            self.token_callback(logps, old, advantages, mask)

    def _check_finite(self, loss: Tensor, logps: Tensor, mask: Tensor) -> None:
        if torch.isfinite(torch.where(mask, logps, 0).sum() + loss):  # one host sync for both
            return
        bad = int((mask & ~torch.isfinite(logps)).sum())
        if bad:
            self._stop("logps", f"{bad} of {int(mask.sum())} logps are")
        self._stop("loss", f"the loss is {loss.item()},")

    def _stop(self, place: str, finding: str) -> None:
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: {finding} not finite; stopped before this step touched the weights, "
            f"checkpoints already written are good; {_REMEDY[place]}"
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 the loss scaler meets infinities by design, and skips those steps itself.
        if norm is not None and self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm):
            self._stop("gradient", "the gradient's norm is")
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the clip's metrics since the last log, over all ranks.

        Args:
            logs: values to log.
            start_time: start of the run, for the speed.
        """
        # Only the training loop's own log, which every rank makes, may talk to the other ranks.
        if self._stats is not None and "loss" in logs:
            logs.update(self._take_metrics(self._stats))
            self._stats = None
        super().log(logs, start_time)

    def _take_metrics(self, stats: ClipStats) -> dict[str, float]:
        size = stats.sums.numel()
        ranks = self.accelerator.gather(torch.cat([stats.sums.flatten(), stats.maxima])[None])
        total = ClipStats(ranks[:, :size].sum(0).view_as(stats.sums), ranks[:, size:].amax(0))
        values = as_floats(total.metrics("clip/"))
        # CISPO caps a weight and takes no token's gradient.
        return {k: v for k, v in values.items() if self.loss_type != "cispo" or "zero_grad" not in k}
