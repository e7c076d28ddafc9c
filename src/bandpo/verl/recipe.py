"""A recipe as `bandpo verl` reads it: every key has a counterpart in verl or is an error that names it.

TRL counts per process and in optimiser steps, verl over all workers, in prompts and in rollouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bandpo._input import InputError, check_number, nearest
from bandpo.engines import _adapter
from bandpo.train.recipe import DEFAULTS, RecipeFile, RecipeKeys, merge, read_yaml

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
LOSS = f"{ACTOR}.policy_loss"
# Keys that mean the same in both, and where verl has them.
DIRECT: dict[str, tuple[type, tuple[str, ...]]] = {
    "num_generations": (int, (f"{ROLLOUT}.n",)),
    "max_completion_length": (int, ("data.max_response_length",)),
    "temperature": (float, (f"{ROLLOUT}.temperature", f"{ROLLOUT}.val_kwargs.temperature")),
    "top_p": (float, (f"{ROLLOUT}.top_p",)),
    "learning_rate": (float, (f"{ACTOR}.optim.lr",)),
    "weight_decay": (float, (f"{ACTOR}.optim.weight_decay",)),
    "max_grad_norm": (float, (f"{ACTOR}.optim.clip_grad",)),
    "num_iterations": (int, (f"{ACTOR}.ppo_epochs",)),
    "activation_checkpointing": (bool, (f"{MODEL}.enable_gradient_checkpointing",)),
    "gradient_checkpointing": (bool, (f"{MODEL}.enable_gradient_checkpointing",)),
    "eval_samples": (int, (f"{ROLLOUT}.val_kwargs.n",)),
    "save_total_limit": (int, ("trainer.max_actor_ckpt_to_keep",)),
    "vllm_gpu_memory_utilization": (float, (f"{ROLLOUT}.gpu_memory_utilization",)),
    "run_name": (str, ("trainer.experiment_name",)),
    "seed": (
        int,
        ("data.seed", f"{ACTOR}.data_loader_seed", f"{ACTOR}.fsdp_config.seed", f"{ROLLOUT}.seed"),
    ),
}
# Keys that are worked out, by `schedule` or in translate.py.
OTHERS: dict[str, type] = {
    **{"task": str, "model": str, "clip": str, "task_args": dict, "clip_args": dict, "verl": dict, "use_cpu": bool},
    **{"max_steps": int, "save_steps": int, "eval_every": int, "eval_prompts": int, "threads": int, "bf16": bool},
    **{"per_device_train_batch_size": int, "per_device_eval_batch_size": int, "steps_per_generation": int},
    **{"gradient_accumulation_steps": int, "lr_scheduler_type": str, "warmup_steps": float, "top_k": int},
    **{"adam_beta1": float, "adam_beta2": float, "loss_type": str, "scale_rewards": str, "beta": float},
    **{"use_vllm": bool, "use_peft": bool, "lora_r": int, "lora_alpha": int, "lora_target_modules": list},
    **{"report_to": str, "vllm_tensor_parallel_size": int, "clip_metrics": str},
    **{"logging_steps": int, "disable_tqdm": bool, "dataloader_pin_memory": bool},
}
KINDS: dict[str, type] = {**{key: kind for key, (kind, _) in DIRECT.items()}, **OTHERS}
# TRL and verl have other defaults for these, so a recipe must say them.
REQUIRED = (
    *("task", "model", "num_generations", "per_device_train_batch_size", "max_completion_length", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "weight_decay"),
)
INSTEAD = {
    "output_dir": "name the folder with --out",
    "resume_from_checkpoint": "continue a run with --resume",
    "num_train_epochs": "give max_steps",
    "generation_batch_size": "give steps_per_generation",
    "epsilon": "the clip sets the bounds; give clip: fixed and clip_args",
    "epsilon_high": "the clip sets the bounds; give clip: fixed and clip_args",
    "delta": f"for the clip's radius give clip_args.delta; verl caps ratios with a dual clip, {LOSS}.dual_clip",
    "use_liger_kernel": f"set {MODEL}.use_liger under 'verl:'",
    "fp16": f"set +{ACTOR}.fsdp_config.mixed_precision under 'verl:'",
}
# verl's keys that the run's folder and its figures are made from; the recipe's own key sets them.
OWNED = {
    "trainer.total_training_steps": "max_steps",
    "trainer.save_freq": "save_steps",
    "trainer.test_freq": "eval_every",
    "trainer.n_gpus_per_node": "verl.workers",
    "trainer.nnodes": "verl.nodes",
    "trainer.logger": "report_to",
    **{f"trainer.{key}": "--out" for key in ("default_local_dir", "validation_data_dir", "resume_mode")},
    "data.train_batch_size": "per_device_train_batch_size and steps_per_generation",
    **{f"data.{key}": "task" for key in ("train_files", "val_files")},
    f"{ACTOR}.ppo_mini_batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    f"{ACTOR}.ppo_epochs": "num_iterations",
    f"{ROLLOUT}.n": "num_generations",
    f"{ROLLOUT}.val_kwargs.n": "eval_samples",
    f"{MODEL}.path": "model",
    **{f"{LOSS}.{key}": "clip" for key in ("_target_", "loss_mode", "clip")},
    **{f"{LOSS}.{key}": key for key in ("clip_args", "clip_metrics")},
}
# Settings of verl's own clip, which another one replaces.
REPLACED = {
    **{f"{ACTOR}.{key}": "clip" for key in ("clip_ratio", "clip_ratio_low", "clip_ratio_high")},
    f"{ACTOR}.clip_ratio_c": f"{LOSS}.dual_clip, added with a +,",
}
OURS = ("workers", "nodes", "ray_address", "overrides")  # in the `verl:` mapping; all its other keys are verl's


@dataclass(frozen=True)
class VerlRecipe:
    """A recipe whose keys verl has counterparts for.

    Args:
        name: the recipe's name.
        values: every key that is set, by the file, the command line or bandpo's defaults.
        words: the command line's part, as it was given.
    """

    name: str
    values: dict[str, Any]
    words: tuple[str, ...]

    @property
    def own(self) -> list[tuple[str, Any]]:
        """What the `verl:` mapping sets of verl's own: keys with dots, and values."""
        return [(key, value) for key, value in _flat(self.values.get("verl") or {}) if key not in OURS]

    def get(self, key: str) -> Any:
        """A key's value, or the default of bandpo's own keys; None for any other key that is not set."""
        return self.values.get(key, getattr(RecipeKeys, key, None))

    @property
    def ours(self) -> dict[str, Any]:
        """The keys workers, nodes, ray_address and overrides of the `verl:` mapping."""
        return {"workers": 1, "nodes": 1, "ray_address": None, "overrides": []} | _ours(self.values.get("verl") or {})


@dataclass(frozen=True)
class Schedule:
    """How long the run is and how its batches are cut.

    Args:
        workers: processes that train, over all nodes.
        rollouts: how many; verl calls one a training step.
        updates: optimiser steps that a rollout feeds.
        prompts: prompts in a rollout.
        mini_batch: prompts in an optimiser step.
        save_every: rollouts between checkpoints.
        test_every: rollouts between evaluations.
    """

    workers: int
    rollouts: int
    updates: int
    prompts: int
    mini_batch: int
    save_every: int
    test_every: int


def check_recipe(recipe: RecipeFile, words: Sequence[str] = ()) -> VerlRecipe:
    """Lay the command line over a recipe and check every key for a counterpart in verl.

    Args:
        recipe: from `read_recipe`.
        words: ``--key value`` for the recipe's keys, ``key=value`` for verl's own.

    Returns:
        The checked recipe.

    Raises:
        InputError: a key or value that cannot be translated.
    """
    given, nested, hydra = _command_line(words)
    values = {key: _typed(key, value, f"recipe {recipe.name}: {key}") for key, value in recipe.keys.items()}
    values = {"clip": _adapter.CLIP, **merge(values, given, nested)}
    for key in REQUIRED:
        if values.get(key) is None:
            raise InputError(f"recipe {recipe.name}: {key} is missing; TRL's default is not verl's, so give it")
    resolved = VerlRecipe(recipe.name, values, tuple(words))
    if hydra:  # kept with the recipe, which is then whole; a key given again counts once
        found = {bare(word): word for word in [*resolved.ours["overrides"], *hydra]}
        values["verl"] = {**(values.get("verl") or {}), "overrides": list(found.values())}
    owned = OWNED if values["clip"] == _adapter.HOST else OWNED | REPLACED
    for key in map(bare, (*(key for key, _ in resolved.own), *resolved.ours["overrides"])):
        if key in owned:
            raise InputError(f"{key} cannot be set here: {owned[key]} sets it")
    _check(resolved)
    return resolved


def schedule(recipe: VerlRecipe) -> Schedule:
    """Work out verl's batches and lengths.

    Args:
        recipe: from `check_recipe`.

    Returns:
        The schedule.

    Raises:
        InputError: the numbers do not divide as verl needs it.
    """
    get, ours = recipe.values.get, recipe.ours
    workers = ours["workers"] * ours["nodes"]
    micro, n = recipe.values["per_device_train_batch_size"], recipe.values["num_generations"]
    accumulate = get("gradient_accumulation_steps", 1)
    per_rollout = get("steps_per_generation", accumulate)
    if per_rollout % accumulate:
        raise InputError(f"steps_per_generation={per_rollout}: must be a multiple of gradient_accumulation_steps")
    step = micro * accumulate * workers
    if step % n:
        raise InputError(
            f"per_device_train_batch_size={micro}: an optimiser step has {step} completions over {workers} workers, "
            f"which must be a multiple of num_generations={n}, because verl counts prompts; change one of them"
        )
    updates = per_rollout // accumulate * get("num_iterations", 1)
    lengths = {"max_steps": recipe.values["max_steps"]}
    lengths["save_steps"] = get("save_steps", lengths["max_steps"])
    lengths["eval_every"] = get("eval_every") or lengths["max_steps"]
    for key, steps in lengths.items():
        if steps < 1 or steps % updates:
            low = steps // updates * updates
            fit = f"{low} or {low + updates}" if low > 0 else f"{updates}"
            raise InputError(f"{key}={steps}: verl counts rollouts, each of {updates} optimiser steps; give {fit}")
    rollouts, save, test = (steps // updates for steps in lengths.values())
    return Schedule(workers, rollouts, updates, step * (per_rollout // accumulate) // n, step // n, save, test)


# ---------------------------------------------------------------- reading and checking


def _command_line(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """The recipe's keys, those that reach inside a mapping, and verl's own overrides."""
    plain: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    hydra: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if not re.match(r"(\+\+?)?[A-Za-z_][\w.@/-]*=|~[A-Za-z_]", word):
                raise InputError(f"{word!r} belongs to no key; write --key value, or key=value for a key of verl's own")
            hydra.append(word)
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        outer, dot, inner = key.partition(".")
        outer = outer.replace("-", "_")
        kind = _kind(outer, f"--{key}")
        if not equals and kind is bool and (not rest or rest[0].startswith("--")):
            text = "true"
        elif not equals:
            if not rest:
                raise InputError(f"--{key}: needs a value, as in --{key} 0.02")
            text = rest.pop(0)
        if dot and kind is not dict:
            raise InputError(f"--{key}: {outer} takes {kind.__name__}, not a mapping")
        value = text if kind is str and not dot else read_yaml(text, f"--{key}")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            plain[outer] = _typed(outer, value, f"--{key}")
    return plain, nested, hydra


def _kind(key: str, where: str) -> type:
    if key in INSTEAD:
        raise InputError(f"{where} cannot be set here: {INSTEAD[key]}")
    if key not in KINDS:
        raise InputError(
            f"{where}: has no counterpart in verl that bandpo knows{nearest(key, KINDS)}; leave it out, or set verl's "
            "own key under 'verl:'"
        )
    return KINDS[key]


def _typed(key: str, value: Any, where: str) -> Any:
    """The value as the key's type."""
    kind = _kind(str(key), where)
    if kind is int and isinstance(value, float) and value.is_integer():  # TRL's save_steps, for one, is a float
        value = int(value)
    fits: dict[type, Callable[[Any], bool]] = {
        int: lambda x: isinstance(x, int) and not isinstance(x, bool),
        float: lambda x: isinstance(x, (int, float)) and not isinstance(x, bool),
        str: lambda x: (
            isinstance(x, (str, bool, list)) if key in ("scale_rewards", "report_to") else isinstance(x, str)
        ),
        dict: lambda x: isinstance(x, dict) or x is None,
    }
    if not fits.get(kind, lambda x: isinstance(x, kind))(value):
        raise InputError(f"{where}={value!r}: this key takes {'a mapping' if kind is dict else kind.__name__}")
    if kind is str and not isinstance(value, str):
        return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return float(value) if kind is float else value


def _check(recipe: VerlRecipe) -> None:
    """What can be said about a recipe without a task or a model."""
    get = recipe.get
    _check_clip(recipe)
    for key in ("num_generations", "per_device_train_batch_size", "max_completion_length", "eval_prompts"):
        check_number(key, get(key), 1)
    for key in ("steps_per_generation", "gradient_accumulation_steps", "num_iterations", "eval_samples"):
        check_number(key, get(key) if get(key) is not None else 1, 1)
    check_number("learning_rate", get("learning_rate"), 0, open_low=True)
    if get("temperature") is not None:
        check_number("temperature", get("temperature"), 0, open_low=True)
    if get("use_cpu") and get("bf16"):
        raise InputError("bf16=True with use_cpu: must be False on a CPU; leave it out")
    if get("use_vllm") is False and not get("use_cpu"):
        raise InputError(f"use_vllm=False: verl generates with an engine; leave it out, or set {ROLLOUT}.name")
    plan, log = schedule(recipe), get("logging_steps")
    if log not in (None, 1, plan.updates):
        raise InputError(f"logging_steps={log}: verl logs once a rollout, {plan.updates} steps; leave it out")
    for key in ("disable_tqdm", "dataloader_pin_memory"):  # TRL's screen and loader; what bandpo train sets is harmless
        if get(key) not in (None, DEFAULTS.get(key, False)):
            raise InputError(f"{key}={get(key)!r}: has no counterpart in verl; leave it out")


def _check_clip(recipe: VerlRecipe) -> None:
    clip, given, how_much = (recipe.get(key) for key in ("clip", "clip_args", "clip_metrics"))
    if how_much is not None:
        _adapter.check_how_much(how_much)
    if clip != _adapter.HOST:
        _adapter.refuse_needs(_adapter.make_clip(clip, given), (), "verl")
    elif given:
        raise InputError(f"clip_args={given!r} with clip='host': must be left out, set verl's own keys under 'verl:'")


def _ours(mapping: dict[str, Any]) -> dict[str, Any]:
    found = {key: mapping[key] for key in OURS if mapping.get(key) is not None}
    for key in ("workers", "nodes"):
        value = found.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"verl.{key}={value!r}: must be a whole number of at least 1")
    words = found.get("overrides", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError(f"verl.overrides={words!r}: must be a list of words such as trainer.balance_batch=false")
    return found


def _flat(mapping: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Keys with dots; below a key that is added with "+" a mapping is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value and not name.startswith("+"):
            found += _flat(value, f"{name}.")
        else:
            found.append((name, value))
    return found


def bare(word: str) -> str:
    """Return the key of a hydra override, without its prefix and value."""
    return word.lstrip("+~").partition("=")[0]
