"""Importance correction: a weight for what the engine that sampled and the trainer disagree in."""

from __future__ import annotations

from torch import Tensor

from bandpo._input import InputError, check_number, nearest
from bandpo.clips.anchored import sampled_logps
from bandpo.operator.sequences import lengths, sequence_mean
from bandpo.operator.tokens import MOST_LOG_RATIO, Tokens

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def check_importance(mode: str | None, cap: float, anchor: str) -> None:
    """Raise InputError for an unknown mode, a cap that is none, or a mode beside an anchor that corrects already."""
    check_number("importance_sampling_cap", cap, 0.0, open_low=True)
    if mode is None:
        return
    if mode not in MODES:
        raise InputError(
            f"importance_sampling_mode={mode!r}: must be None or one of {', '.join(MODES)}{nearest(mode, MODES)}"
        )
    if anchor in ("r", "both"):
        raise InputError(
            f"importance_sampling_mode={mode!r} with anchor={anchor!r}: must be None, the weight is measured from the "
            "sampling engine already; or give anchor='old' or 'p'"
        )


def importance_weight(tokens: Tokens, mode: str, cap: float) -> Tensor:
    """Return old / rollout of each token or sequence, truncated or masked.

    w = min(v, cap) or v 1[v <= cap],  v = old / rollout of the token, or the product over its sequence

    Args:
        tokens: with rollout_logps.
        mode: one of `MODES`, the names of TRL's `vllm_importance_sampling_mode`.
        cap: greatest weight.

    Returns:
        Tensor that broadcasts with the tokens.

    Raises:
        InputError: tokens without rollout_logps, or without sequences.

    Source: truncated importance sampling and its masked form, as in TRL and verl (`rollout_is`).
    """
    log_w = tokens.log_p - sampled_logps(tokens, "importance_sampling_mode")
    if mode.startswith("sequence"):
        log_w = sequence_mean(log_w, tokens) * lengths(tokens)
    weight = log_w.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
    return weight.clamp(max=cap) if mode.endswith("truncate") else weight * (weight <= cap)
