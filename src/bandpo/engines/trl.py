"""TRL's GRPO trainer under any clip: TRL's loss is kept, only what it clamps with or weighs by is exchanged.

A hard gate goes as two bounds per token, where TRL has two numbers. Every other clip goes as advantages c / r per
token, with TRL's own clip opened to [0, inf]; `loss_type` then only chooses how tokens are averaged.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bandpo import Band, ClipStats, clip_stats
from bandpo._input import InputError
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS
from bandpo.engines._trl_config import BandGRPOConfig as BandGRPOConfig
from bandpo.engines._trl_config import Below, check_options, make_clip
from bandpo.engines._trl_config import clip_of as clip_of

HOST = HOSTS["trl"]
with HOST.imports():
    import transformers
    import trl
    from packaging.version import Version
    from trl import GRPOTrainer

_SEAM = (
    "(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
    'advantages = inputs["advantages"]',
    'old_per_token_logps = inputs.get("old_per_token_logps")',
)
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


def _warn_if_idle(args: BandGRPOConfig) -> None:
    """Warn when each rollout feeds a single optimizer step: then every ratio is 1."""
    accumulate, per_rollout = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    if accumulate % per_rollout == 0 and args.clip_anchor == "old":
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
    """TRL's GRPOTrainer under any clip of the registry, or of your own.

    TRL computes ``-min(r A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)``. A region such as Band gives the two
    bounds, made from the log-probabilities in the ratio's denominator; any other clip gives A, as c / r. All else is
    TRL's.

    Args:
        model: as in TRL's GRPOTrainer.
        reward_funcs: as in TRL's GRPOTrainer.
        args: a BandGRPOConfig; None for its defaults.
        *rest: TRL's further arguments.
        **named: TRL's further arguments by name.

    Attributes:
        clip: the clip in use, for `clip="host"` TRL's own; None where the registry has not that one. With a schedule
            that of the present step.
        token_callback: None or ``f(logps, old_logps, advantages, mask)``, called with detached (batch, token) tensors
            at each training micro-batch; both log-probabilities are the same where a rollout feeds one update.

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
        check_options(args)
        _warn_if_idle(args)
        if not isinstance(args.clip, str) or args.clip != Band.name:  # the model card names what was really used
            self._name, self._paper, self._tag_names = GRPOTrainer._name, GRPOTrainer._paper, GRPOTrainer._tag_names
        super().__init__(model, reward_funcs, args, *rest, **named)
        self._clip = make_clip(args)
        self.clip = None if self._clip is None else self._clip.at(0.0)
        if self._clip is None:
            warnings.warn(
                f"clip='host': TRL's own clip with loss_type={args.loss_type!r}, importance_sampling_level="
                f"{args.importance_sampling_level!r}, epsilon={args.epsilon}, epsilon_high={args.epsilon_high} and "
                f"delta={args.delta} is none of the registry's: it trains as ever, and is not measured",
                UserWarning,
                stacklevel=2,
            )
        self.token_callback: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
        self._logps: Tensor | None = None
        self._entropies: Tensor | None = None
        self._stats: ClipStats | None = None
        self._told_of_rewards = False
        self._shaped: dict[str, Any] | None = None  # the inputs of a loss whose advantages are still to be exchanged

    def _calculate_rewards(self, *args: Any, **named: Any) -> Any:
        """Count the completions whose rewards TRL cannot use, which it would turn into advantages of 0."""
        rewards = super()._calculate_rewards(*args, **named)  # (completion, function), of all ranks; NaN for None
        bad = rewards.isinf().any(1) | rewards.isnan().all(1)
        share = bad.float().mean().item()
        self._metrics[self._mode]["rewards/not_finite"].append(share)
        if share and not self._told_of_rewards and self.accelerator.is_main_process:
            self._told_of_rewards = True
            warnings.warn(
                f"rewards: {int(bad.sum())} of {len(bad)} completions have an infinite one, or none but NaN and None; "
                "TRL gives such a completion advantage 0, and where one is infinite its whole group; the share is "
                "logged as rewards/not_finite, this is said once",
                UserWarning,
                stacklevel=2,
            )
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **named)
        self._logps = result[0].detach()  # TRL keeps them to itself; the clip, the metrics and the guard need them
        self._entropies = None if len(result) < 2 or result[1] is None else result[1].detach()
        if self._shaped is not None:  # TRL reads advantages and old log-probabilities after these
            self._exchange(self._shaped)
            self._shaped = None
        return result

    def _exchange(self, inputs: dict[str, Any]) -> None:
        """Put c / r in the place of the advantages."""
        assert self.clip is not None and self._logps is not None
        old = inputs.get("old_per_token_logps")  # without them TRL's ratio is exactly 1
        shaped = _adapter.shape(
            self.clip, self._logps, self._logps if old is None else old, _per_token(inputs["advantages"], self._logps),
            _token_mask(inputs), *self._optional(inputs),
        )  # fmt: skip
        inputs["advantages"], inputs["old_per_token_logps"] = shaped.advantages, shaped.old_logps
        self._keep(shaped.stats)

    def _optional(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return rollout_logps and entropies, where the clip wants them."""
        needs = () if self.clip is None else self.clip.needs
        rollout = inputs.get("sampling_per_token_logps") if "rollout_logps" in needs else None
        return rollout, self._entropies if "entropies" in needs else None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        old, mine = inputs.get("old_per_token_logps"), dict(inputs)
        if self._clip is not None:
            self.clip = self._clip.at(min(self.state.global_step / max(self.state.max_steps, 1), 1.0))
        scalars, uses = (self.epsilon_low, self.epsilon_high), []
        self._logps = None
        if self.args.clip != _adapter.HOST:
            shaped = not _adapter.by_margins(self.clip)
            bounds = None if old is None or shaped else self.clip.bounds(old)  # type: ignore[union-attr]
            low, high = _Low(0.0 if bounds is None else bounds.low), _High(math.inf if bounds is None else bounds.high)
            self.epsilon_low, self.epsilon_high, uses = low, high, [low, high]
            self._shaped = mine if shaped else None
        before = {name: len(values) for name, values in self._metrics[self._mode].items()}
        try:
            loss = super()._compute_loss(model, mine)
        finally:
            self.epsilon_low, self.epsilon_high = scalars
            missed, self._shaped = self._shaped is not None, None
        if self._logps is None or missed or not all(edge.uses for edge in uses):
            raise HOST.error("its GRPO loss went round the clip")
        if uses and not _adapter.by_margins(self.clip):
            self._drop_clip_metrics(before)
        self._after_loss(loss.detach(), self._logps, old, inputs)
        return loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _drop_clip_metrics(self, before: dict[str, int]) -> None:
        """Take TRL's own clip metrics of this loss away: with its clip opened they say nothing."""
        metrics = self._metrics[self._mode]
        for name in [name for name in metrics if name.startswith("clip_ratio/")]:
            del metrics[name][before.get(name, 0) :]
            if not metrics[name]:
                del metrics[name]

    def _after_loss(self, loss: Tensor, logps: Tensor, old: Tensor | None, inputs: dict[str, Any]) -> None:
        mask = _token_mask(inputs)
        self._check_finite(loss, logps, mask)
        if not self.model.training:
            return
        old = logps if old is None else old
        advantages = _per_token(inputs["advantages"], logps).expand_as(logps)
        host, clip = self.args.clip == _adapter.HOST, self.clip
        if clip is not None and (host or _adapter.by_margins(clip)) and self.args.clip_metrics != "none":
            if self.args.delta is not None and not host:
                clip = Below(clip, self.args.delta)
            rollout, entropies = self._optional(inputs)
            self._keep(clip_stats(logps, old, advantages, mask, clip=clip, rollout_logps=rollout, entropies=entropies))
        if self.token_callback is not None:
            self.token_callback(logps, old, advantages, mask)

    def _keep(self, stats: ClipStats) -> None:
        if self.model.training:
            self._stats = stats if self._stats is None else self._stats + stats

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
        every = torch.cat([stats.sums.flatten(), stats.maxima.flatten().to(stats.sums.dtype)])
        ranks = self.accelerator.gather(every[None])
        total = ClipStats(ranks[:, :size].sum(0).view_as(stats.sums), ranks[:, size:].amax(0).view_as(stats.maxima))
        return _adapter.as_floats(_adapter.chosen_metrics(total, self.args.clip_metrics, "clip/"))


def _per_token(advantages: Tensor, logps: Tensor) -> Tensor:
    """Return advantages of shape (batch, 1) or (batch, token)."""
    return advantages if advantages.dim() == logps.dim() else advantages.unsqueeze(1)


def _token_mask(inputs: dict[str, Any]) -> Tensor:
    mask: Tensor = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    return mask.bool()
