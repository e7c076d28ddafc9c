"""slime's policy loss under any clip, for `--custom-loss-function-path`; slime has no package, see the docs.

A region such as Band gives slime's clamp two bounds per token. Any other clip goes as advantages c / r, with the clamp
opened wide.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandpo import Clip, ClipStats, clip_stats, list_clips
from bandpo._input import InputError
from bandpo.clips.dual_clip import Dual
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

HOST = HOSTS["slime"]
with HOST.imports():
    from slime.backends.megatron_utils import loss as host

_CLIPPED = "compute_policy_loss"  # where slime clips: a function that its loss calls
_SEAM = (
    "ppo_kl = old_log_probs - log_probs",
    f"{_CLIPPED}(ppo_kl, advantages, args.eps_clip, args.eps_clip_high",
)
_DEFAULTS = {"eps_clip": 0.2, "eps_clip_high": 0.2}  # of slime; its parser needs Megatron
_OTHERS = ("gspo", "cispo", "reinforce")  # slime's losses that do not call that function, or with no token's ratio


def check_seam() -> None:
    """Check that the installed slime still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.check_source(host, "policy_loss_function", _SEAM)
    HOST.find(host, _CLIPPED)


check_seam()


def band_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return slime's own policy loss under a clip.

    Set ``--loss-type custom_loss --custom-loss-function-path bandpo.engines.slime.band_loss``; the options `clip` (a
    name or an import path, the band when there is none), `clip_args` (a dict) and `clip_metrics` ("brief", "full" or
    "none") are read from the YAML file of ``--custom-config-path``. slime's dual clip, `eps_clip_c`, holds beside them.

    Args:
        args: slime's arguments.
        batch: slime's micro-batch; its samples are the sequences.
        logits: the model's output.
        sum_of_sample_mean: slime's reduction.

    Returns:
        slime's loss and metrics, with those of the clip as ``clip/NAME``, averages over micro-batches in slime's own
        way. For a clip that goes as advantages `pg_clipfrac` is the share of tokens without a gradient.

    Raises:
        InputError: bad clip, a setting that the clip replaces, a loss that does not clip a token's ratio, a clip of
            sequences where context parallelism cuts them.
    """
    clip, how_much = _check_args(args)
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    if not old:  # every ratio is 1
        return host.policy_loss_function(args, batch, logits, sum_of_sample_mean)
    rollout = None if args.use_rollout_logprobs else batch.get("rollout_log_probs")  # else they are the old ones
    call = _Call(clip, list(old), batch.get("loss_masks"), rollout)
    loss, metrics = _exchange(host.policy_loss_function, _CLIPPED, call)(args, batch, logits, sum_of_sample_mean)
    if call.stats is None:
        raise HOST.error("its policy loss went round the clip")
    weight = sum_of_sample_mean(torch.ones_like(call.old))  # slime adds over micro-batches, and divides by this sum
    ours = _adapter.chosen_metrics(call.stats(), how_much, "clip/")
    return loss, metrics | {name: share * weight for name, share in ours.items()}


class _Call:
    """Stands for slime's `compute_policy_loss` in one micro-batch."""

    def __init__(self, clip: Clip, old: list[Tensor], masks: Any, rollout: Any) -> None:
        self.clip, self.lengths = clip, [len(x) for x in old]
        self.old = torch.cat(old).detach()
        whole = masks is not None and [len(mask) for mask in masks] == self.lengths
        self.mask = torch.cat(list(masks)).bool() if whole else None
        self.stats: Callable[[], ClipStats] | None = None
        _adapter.refuse_needs(clip, ("rollout_logps",) if rollout else (), "slime")
        self.rollout = torch.cat(list(rollout)) if rollout and "rollout_logps" in clip.needs else None
        if clip.looks_at != "token" and self.mask is None:
            raise InputError(
                f"clip={clip.name!r}: looks at whole sequences, and slime's context parallelism cuts them; must be a "
                "clip of single tokens, such as clip='band', or context_parallel_size=1"
            )

    def __call__(
        self, ppo_kl: Tensor, advantages: Tensor, eps_clip: Any, eps_clip_high: Any, eps_clip_c: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return slime's loss of each token, and 1 where it was clipped."""
        own = getattr(host, _CLIPPED)
        t = self.old - ppo_kl.detach(), self.old, advantages, self.mask
        if _adapter.by_margins(self.clip):
            self.stats = lambda: clip_stats(*t, clip=self.clip, dual_clip=eps_clip_c)
            dual_clip = {} if eps_clip_c is None else {"eps_clip_c": eps_clip_c}
            return own(ppo_kl, advantages, *_adapter.margins(self.clip, self.old), **dual_clip)  # type: ignore[no-any-return]
        clip = self.clip if eps_clip_c is None else Dual(self.clip, eps_clip_c)  # slime's would act on c / r
        shaped = _adapter.shape(clip, *(self._rows(x) for x in (*t, self.rollout)))  # type: ignore[arg-type]
        self.stats = lambda: shaped.stats
        given, old, shut = (self._flat(x) for x in (shaped.advantages, shaped.old_logps, shaped.shut))
        return own(ppo_kl + (old - self.old), given, 1.0, math.inf)[0], shut

    def _rows(self, x: Tensor | None) -> Tensor | None:
        """For a clip of sequences, return what is joined as (sample, token), filled up with 0."""
        if x is None or self.clip.looks_at != "sequence":
            return x
        return pad_sequence(list(x.split(self.lengths)), batch_first=True)

    def _flat(self, x: Tensor) -> Tensor:
        """Return it joined again."""
        return x if x.dim() == 1 else torch.cat([row[:n] for row, n in zip(x, self.lengths, strict=True)])


def _exchange(function: Any, name: str, value: Any) -> Any:
    """Return a function in which one name of its module means something else; the module stays as it is."""
    names = {**function.__globals__, name: value}
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _check_args(args: Any) -> tuple[Clip, str]:
    """Return the clip and how much of its metrics is wanted; refuse arguments with which slime would not use it."""
    kind = host.get_pg_loss_type(args) if hasattr(host, "get_pg_loss_type") else None  # newer ones have it
    for name, value in (("advantage_estimator", args.advantage_estimator), ("policy loss type", kind)):
        if value in _OTHERS:
            ours = f" with clip={value!r}" if value in list_clips() else ""
            raise InputError(
                f"{name}={value!r}: must be one that clips a token's ratio; choose grpo, reinforce_plus_plus or ppo"
                f"{ours}, or slime's own loss"
            )
    _adapter.refuse_strays("custom-config-path", vars(args), known=("clip_grad",))  # the last is Megatron's
    clip, how_much = getattr(args, "clip", _adapter.CLIP), getattr(args, "clip_metrics", "brief")
    made = _adapter.make_clip(clip, getattr(args, "clip_args", None))
    _adapter.check_how_much(how_much)
    _adapter.refuse_replaced(args, _DEFAULTS, clip)
    return made, how_much
