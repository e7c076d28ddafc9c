"""A recipe at the size of a smoke: the same algorithm, as small as it goes, to see whether everything fits together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bandpo._input import InputError, nearest
from bandpo.lab.reading import RecipeFile
from bandpo.lab.recipe import flat, shown

DEFAULTS = {"eval_prompts": 4, "eval_samples": 1, "eval_every": 0}
SIZES = (
    *("model", "task_args", "max_steps", "save_steps", "num_generations", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "steps_per_generation", "max_completion_length"),
    *("eval_prompts", "eval_samples", "eval_every", "per_device_eval_batch_size"),
    *("threads", "use_cpu", "bf16", "gradient_checkpointing", "activation_checkpointing"),
    *("use_vllm", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization", "trl", "verl"),
)
"""What a smoke may change: sizes, data and the machine. What is learnt, and how, stays the recipe's."""


def shrink(file: RecipeFile, engine: str) -> tuple[RecipeFile, str]:
    """Return a recipe at the size of a smoke.

    Args:
        file: a recipe; its mapping `smoke` holds the keys that are changed, beside which an evaluation is of four
            problems. Without `max_steps` there the run is two optimiser steps, with verl one rollout.
        engine: "trl" or "verl".

    Returns:
        The recipe, not checked yet, and a line that says what was changed.

    Raises:
        InputError: the mapping has a key that is no size.
    """
    for key in file.smoke:
        if key not in SIZES:
            raise InputError(
                f"recipe {file.name}: smoke.{key}: a smoke changes sizes and leaves the algorithm as it is"
                f"{nearest(key, SIZES)}; leave it out, or give it on the command line"
            )
    small = {**DEFAULTS, **file.smoke}
    keys = {key: _over(file.keys.get(key), value, key) for key, value in small.items()}
    if "max_steps" not in small:
        keys["max_steps"] = 2 if engine == "trl" else _rollout({**file.keys, **keys})
    other = "trl" if engine == "verl" else "verl"
    changed = [
        f"{name} {shown(value)} ({'not set' if was is None else shown(was)})"
        for key, new in keys.items() if key != other
        for name, value, was in _changes(key, file.keys.get(key), new)
    ]  # fmt: skip
    return RecipeFile(file.name, {**file.keys, **keys}), f"smoke, instead of the recipe's own: {', '.join(changed)}"


def _over(old: Any, new: Any, key: str) -> Any:
    """A mapping over the one that was there; any other value in its place."""
    if not isinstance(new, Mapping):
        return new
    if not isinstance(old or {}, Mapping):  # which `load` refuses
        return old
    before, after = ((dict(flat(x)) if key == "verl" else x) for x in (old or {}, dict(new)))
    return {**before, **after}


def _rollout(keys: dict[str, Any]) -> int:
    """Optimiser steps of one rollout, as far as they can be told before the recipe is checked."""
    accumulate, each, passes = (
        value if isinstance(value := keys.get(key), int) and value > 0 else 1
        for key in ("gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    )
    return max(1, each // accumulate) * passes


def _changes(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Name, new and old value of each key that is not what it was, those inside a mapping one by one."""
    if not isinstance(new, dict):
        return [] if new == old else [(key, new, old)]
    before = old if isinstance(old, dict) else {}
    before = dict(flat(before)) if key == "verl" else before
    return [(f"{key}.{name}", value, before.get(name)) for name, value in new.items() if value != before.get(name)]
