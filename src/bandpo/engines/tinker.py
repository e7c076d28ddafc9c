"""A loss for tinker's `forward_backward_custom`; tested with tinker 0.38.0, without the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo import Region, clip_stats, policy_loss
from bandpo._checks import InputError
from bandpo.engines._hosts import HOSTS
from bandpo.engines._margins import CLIP, as_floats, make_clip, overall

HOST = HOSTS["tinker"]
with HOST.imports():
    import tinker

Loss = Callable[[list[tinker.Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]


def check_seam() -> None:
    """Check that the installed tinker still has what this adapter relies on.

    Raises:
        InputError: it has moved; names the version that is tested.
    """
    HOST.find(tinker.TrainingClient, "forward_backward_custom")


check_seam()


def band_loss(
    clip: str | Region = CLIP, clip_args: Mapping[str, Any] | None = None, dual_clip: float | None = None
) -> Loss:
    """Return a loss for `TrainingClient.forward_backward_custom`, which takes the data of tinker's own "ppo" loss.

    loss = -sum_t min(r A, clip(r) A) over all data: a sum, as tinker's losses are.

    Args:
        clip: name of the clip, or a clip.
        clip_args: the clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: with A < 0, no gradient above this ratio: > 1, or None.

    Returns:
        ``f(data, logprobs) -> (loss, metrics)``. Each datum's `loss_fn_inputs` holds "logprobs" (the sampler's),
        "advantages" and, if there is padding, "mask". The metrics are floats, as ``clip/NAME``.

    Raises:
        InputError: bad clip; later, when called, a datum that lacks an input.
    """
    region = make_clip(clip, clip_args)

    def loss_fn(data: list[tinker.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        new = torch.cat(logprobs)
        old, advantages = (_join(data, key, new) for key in ("logprobs", "advantages"))
        masked = any("mask" in datum.loss_fn_inputs for datum in data)
        mask = _join(data, "mask", new) if masked else None
        out = policy_loss(
            new, old, advantages, mask, clip=region, dual_clip=dual_clip, aggregation="sum", metrics=False,
            exact_value=True,
        )  # fmt: skip
        stats = clip_stats(new.detach(), old, advantages, mask, clip=region, dual_clip=dual_clip)
        return out.loss, as_floats(overall(stats.metrics(), "clip/"))

    return loss_fn


def _join(data: list[tinker.Datum], key: str, like: Tensor) -> Tensor:
    for i, datum in enumerate(data):
        if key not in datum.loss_fn_inputs:
            raise InputError(f"data[{i}].loss_fn_inputs: must have {key!r}; it has {', '.join(datum.loss_fn_inputs)}")
    return torch.cat([datum.loss_fn_inputs[key].to_torch() for datum in data]).to(like)
