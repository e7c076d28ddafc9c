"""A loss under any clip for tinker's `forward_backward_custom`; tested with tinker 0.38.0, without the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandpo import policy_loss
from bandpo._input import InputError
from bandpo.engines import _adapter
from bandpo.engines._hosts import HOSTS

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
    clip: object = _adapter.CLIP,
    clip_args: Mapping[str, Any] | None = None,
    dual_clip: float | None = None,
    clip_metrics: str = "brief",
) -> Loss:
    """Return a loss for `TrainingClient.forward_backward_custom`, which takes the data of tinker's own "ppo" loss.

    loss = -sum_t min(r A, clip(r) A) over all data: a sum, as tinker's losses are.

    That is its value for a hard gate; for any other clip it is -sum_t r A, with the gradient c of the clip.

    Args:
        clip: the clip: a name or an import path, as `bandpo.get_clip` takes it, a clip, or any object with
            `coefficient(tokens)`. Its p and r belong to the sampler's log-probabilities; each datum is a sequence.
        clip_args: the clip's arguments, e.g. ``{"divergence": "kl", "delta": 0.05}``.
        dual_clip: with A < 0, no gradient above this ratio: > 1, or None.
        clip_metrics: "brief" (nine numbers), "full" (by sign of the advantage and by bucket of old probability too) or
            "none".

    Returns:
        ``f(data, logprobs) -> (loss, metrics)``. Each datum's `loss_fn_inputs` holds "logprobs" (the sampler's),
        "advantages" and, if there is padding, "mask". The metrics are floats, as ``clip/NAME``.

    Raises:
        InputError: bad clip, one that needs what tinker has not; later, when called, a datum that lacks an input.
    """
    made = _adapter.make_clip(clip, clip_args)
    _adapter.refuse_needs(made, (), "tinker, with its one set of old log-probabilities,")
    _adapter.check_how_much(clip_metrics)

    def loss_fn(data: list[tinker.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        new = pad_sequence(logprobs, batch_first=True)
        old, advantages = (_rows(data, key, logprobs) for key in ("logprobs", "advantages"))
        mask = pad_sequence([torch.ones_like(x) for x in logprobs], batch_first=True)
        if any("mask" in datum.loss_fn_inputs for datum in data):
            mask = mask * _rows(data, "mask", logprobs)
        out = policy_loss(
            new, old, advantages, mask, clip=made, dual_clip=dual_clip, aggregation="sum",
            metrics=clip_metrics != "none", exact_value=_adapter.has_value(made),
        )  # fmt: skip
        return out.loss, _adapter.as_floats(_adapter.picked(out.metrics, clip_metrics, "clip/"))

    return loss_fn


def _rows(data: list[tinker.Datum], key: str, logprobs: list[Tensor]) -> Tensor:
    """Return an input of all data as rows of (batch, token), filled up with 0."""
    rows = []
    for i, (datum, like) in enumerate(zip(data, logprobs, strict=True)):
        if key not in datum.loss_fn_inputs:
            raise InputError(f"data[{i}].loss_fn_inputs: must have {key!r}; it has {', '.join(datum.loss_fn_inputs)}")
        rows.append(datum.loss_fn_inputs[key].to_torch().to(like))
        if rows[-1].shape != like.shape:
            raise InputError(
                f"data[{i}].loss_fn_inputs[{key!r}] has shape {tuple(rows[-1].shape)}: must be {tuple(like.shape)}, "
                "one value for each target token"
            )
    return pad_sequence(rows, batch_first=True)
