"""`to_trl`: a recipe as TRL's configuration. TRL's own keys are checked against its own dataclasses."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import GenerationConfig, get_scheduler
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, get_peft_config

from bandpo._input import InputError, nearest
from bandpo.engines.trl import BandGRPOConfig
from bandpo.lab.reading import read_yaml
from bandpo.lab.recipe import MOST, OURS, SHARED, Recipe, multiples, real, refuse_unknown, shown, whole
from bandpo.lab.trl.staleness import check_schedule

# What bandpo sets where the recipe says nothing; all other defaults are TRL's.
DEFAULTS: dict[str, Any] = {"disable_tqdm": True, "logging_steps": 1}
MOST_COMPLETIONS = 10_000_000  # in a rollout
_PLACES = ("output_dir", "resume_from_checkpoint", "model_init_kwargs", "local_rank")
# Ranges of TRL's own numbers: what its loss, its samplers and transformers can use.
_WHOLE = {
    1: ("ddp_timeout", "generation_batch_size", "num_generations_eval", "ref_model_sync_steps", "logging_steps",
        "dataloader_prefetch_factor", "eval_accumulation_steps", "torch_empty_cache_steps", "vllm_max_model_length"),
    0: ("num_completions_to_print", "max_tool_calling_iterations", "data_seed"),
}  # fmt: skip
_SHARES = ("min_p", "top_entropy_quantile", "label_smoothing_factor", "ref_model_mixup_alpha", "lora_dropout")
_CHOICES: dict[str, Any] = {  # of fields that TRL looks at late
    "scale_rewards": ("group", "batch", "none"),
    "vllm_mode": ("colocate", "server"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "cache_implementation": ALL_CACHE_IMPLEMENTATIONS,
    "torch_compile_backend": torch.compiler.list_backends,
}
_POSITIVE = ("num_train_epochs", "repetition_penalty", "adam_epsilon", "vllm_importance_sampling_clip_max",
             "sapo_temperature_pos", "sapo_temperature_neg", "vllm_server_timeout")  # fmt: skip


def to_trl(recipe: Recipe, output_dir: str | Path) -> BandGRPOConfig:
    """Return TRL's configuration of a run whose checkpoints go to `output_dir`.

    Raises:
        InputError: an unknown key, or a value that TRL, the clip or a resumable run cannot use.
    """
    fields = _hints(BandGRPOConfig)
    refuse_unknown(
        recipe, [*fields, *_lora_hints()],
        f"; keys are the fields of TRL's GRPOConfig, its LoRA fields, and {', '.join(OURS)}",
    )  # fmt: skip
    own = _own(recipe)
    shared = {k: v for k, v in recipe.values.items() if k in SHARED and k in fields and v is not None}
    keys = {k: typed(v, fields[k], k, recipe.where(k)) for k, v in shared.items()}
    keys |= {"save_total_limit": recipe.save_total_limit, "report_to": recipe.report_to or "none"}
    given = {**DEFAULTS, **_by_device(recipe, own), **keys, **{k: v for k, v in own.items() if k in fields}}
    _check_kinds(recipe, given)
    try:
        config = BandGRPOConfig(output_dir=str(output_dir), **given)
    except InputError:
        raise
    except Exception as error:  # whatever TRL, transformers and accelerate do with values they cannot use
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"recipe {recipe.name}: {kind}{' '.join(str(error).split())[:400]}") from error
    if config.generation_batch_size > MOST_COMPLETIONS:
        raise InputError(
            f"per_device_train_batch_size={config.per_device_train_batch_size}: a rollout of "
            f"{config.generation_batch_size:,} completions fits no memory; give at most {MOST_COMPLETIONS:,} of them"
        )
    _check_resumable(config)
    _check_learning_rate(config)
    check_schedule(config, recipe.staleness)
    return config


def to_lora(recipe: Recipe) -> Any:
    """Return peft's LoRA configuration, None for a recipe without one."""
    shared = {key: value for key, value in recipe.values.items() if key in _lora_hints() and value is not None}
    own = {key: value for key, value in _own(recipe).items() if key in _lora_hints()}
    try:
        return get_peft_config(ModelConfig(**shared, **own))
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"recipe {recipe.name}: {' '.join(str(error).split())[:400]}") from error


def rollout_steps(config: BandGRPOConfig) -> int:
    """Return after how many optimiser steps the rollouts are used up, again and again: there a checkpoint is exact."""
    micro = config.steps_per_generation * config.num_iterations
    return micro // math.gcd(micro, config.gradient_accumulation_steps)


# ---------------------------------------------------------------- TRL's own keys, by their types


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.name not in _PLACES}


def _lora_hints() -> dict[str, Any]:
    """TRL's own LoRA keys; the rest of its ModelConfig is about loading, which `load_model` does."""
    wanted = ("use_peft", "use_rslora", "use_dora")
    return {k: hint for k, hint in _hints(ModelConfig).items() if k in wanted or k.startswith("lora_")}


def _own(recipe: Recipe) -> dict[str, Any]:
    """TRL's own keys, at the top or under `trl:`, each as its field says."""
    hints = _hints(BandGRPOConfig) | _lora_hints()
    for key in recipe.trl:
        where = f"{recipe.where('trl')}.{key}"
        if key in SHARED:
            raise InputError(f"{where}: is a key of the recipe itself; write {key} at the top")
        if key not in hints:
            raise InputError(f"{where}: TRL's GRPOConfig has no such field{nearest(key, hints)}")
    places = {**{k: recipe.where(k) for k in recipe.others}, **{k: f"{recipe.where('trl')}.{k}" for k in recipe.trl}}
    return {k: typed(v, hints[k], k, places[k]) for k, v in {**recipe.others, **recipe.trl}.items()}


def typed(value: Any, hint: Any, key: str, where: str) -> Any:
    """Return a value, from YAML or as the command line's text, as the field `key` of TRL's with that type takes it."""
    parts = get_args(hint) or (hint,)
    kinds = {get_origin(part) or part for part in parts}
    if isinstance(value, str) and not kinds <= {str, type(None)}:
        value = read_yaml(value, where)
    if isinstance(value, str) and list in kinds and str not in kinds:
        value = value.split(",")
    bad = f"{where}: needs a value" if value is True and where.startswith("--") else f"{where}={shown(value)}"
    described = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    names = _choices(key, parts)
    if names and isinstance(value, str) and value not in names:
        raise InputError(f"{bad}: must be one of {', '.join(names)}{nearest(value, names)}")
    if str in kinds and isinstance(value, (int, float)) and bool not in kinds and not kinds & {int, float}:
        value = str(value)
    try:
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError
        value = TypeAdapter(hint).validate_python(value)
        if key in (checks := _ranges()) and value is not None:
            value = checks[key](value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
    except ValidationError:
        raise InputError(f"{bad}: this key takes {described}") from None
    except ValueError as error:
        raise InputError(f"{bad}: {error}" if str(error) else f"{bad}: this key takes {described}") from None
    return value


def _choices(key: str, parts: tuple[Any, ...]) -> list[str]:
    """The words that a field takes; none where it takes any."""
    known = BandGRPOConfig.__dataclass_fields__.get(key)
    told = _CHOICES.get(key) or (known.metadata.get("choices") if known else None) or ()
    told = told() if callable(told) else told
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, Enum)]
    return [*map(str, told), *(str(choice.value) for enum in enums for choice in enum)]


@cache
def _ranges() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for least, names in _WHOLE.items():
        found |= {name: lambda x, least=least: whole(least, MOST, x) for name in names}
    found["dataloader_num_workers"] = lambda x: whole(0, 1024, x)  # processes
    found |= {name: lambda x: real(0, 1, "", x) for name in _SHARES}
    return found | {name: lambda x: real(0, math.inf, "(", x) for name in _POSITIVE}


# ---------------------------------------------------------------- what can be said without a model


def _by_device(recipe: Recipe, own: dict[str, Any]) -> dict[str, bool]:
    """TRL would take bfloat16 and pinned memory everywhere; take them only where there is a GPU that has them."""
    on_gpu = torch.cuda.is_available() and not recipe.use_cpu
    return {"bf16": on_gpu and not own.get("fp16") and torch.cuda.is_bf16_supported(), "dataloader_pin_memory": on_gpu}


def _check_kinds(recipe: Recipe, given: dict[str, Any]) -> None:
    """What TRL and transformers take at first, and stumble over once there is a model or a rollout."""
    on_cpu = recipe.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if given.get("fp16") and on_cpu:
        raise InputError("fp16=True: needs a GPU, and here there is none in use; leave it out")
    if given.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise InputError("use_vllm=True: vllm is not installed; pip install vllm, or leave it out")
    there = ["all", "none", *get_available_reporting_integrations()]
    for name in recipe.report_to or ():
        if name not in there:
            raise InputError(
                f"report_to={name!r}: is not installed; must be of {', '.join(there)}{nearest(name, there)}"
            )
    sampler = given.get("generation_kwargs") or {}
    known = [*vars(GenerationConfig())] if not given.get("use_vllm") else [*sampler]
    for key in sampler:
        if key in SHARED or key in _hints(BandGRPOConfig):
            raise InputError(f"generation_kwargs.{key}: is a key of the recipe itself; write {key} at the top")
        if key not in known or key.startswith("_"):
            raise InputError(f"generation_kwargs.{key}: transformers has no such setting{nearest(key, known)}")


def _check_resumable(config: BandGRPOConfig) -> None:
    """A checkpoint must hold all there is to know: it falls between rollouts, and all metrics are logged."""
    if config.eval_strategy != "no":
        raise InputError(f"eval_strategy={config.eval_strategy.value!r}: held-out evaluation is set by eval_every")
    if config.save_strategy != "steps" or config.save_only_model:
        raise InputError("save_strategy must be 'steps' and save_only_model false, or a run could not be resumed")
    if config.logging_strategy != "steps":
        raise InputError(
            f"logging_strategy={config.logging_strategy.value!r}: must be 'steps', the report is made from the log"
        )
    if config.max_steps == 0:
        raise InputError("max_steps=0: must be at least 1")
    rollout = rollout_steps(config)
    every = math.lcm(rollout, int(config.logging_steps))
    save = int(config.save_steps)
    if save % every:
        raise InputError(
            f"save_steps={save}: a checkpoint inside a rollout or between two log lines cannot be resumed exactly; "
            f"a multiple of {every} can: set save_steps to {multiples(every, save)}"
        )


def _check_learning_rate(config: BandGRPOConfig) -> None:
    """Make the learning rate's schedule once, and the optimiser's class where it needs no model."""
    weights = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    steps = config.max_steps if config.max_steps > 0 else 1000
    given = config.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            config.lr_scheduler_type, weights, num_warmup_steps=config.get_warmup_steps(steps),
            num_training_steps=steps, scheduler_specific_kwargs=dict(given),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        what = f"lr_scheduler_type={str(config.lr_scheduler_type.value)!r} with lr_scheduler_kwargs={shown(given)}"
        raise InputError(f"{what}: {' '.join(str(error).split())[:200]}; leave lr_scheduler_kwargs out") from None


def check_optimizer(trainer: Any) -> None:
    """Make the optimiser once for a single weight, before any evaluation is spent."""
    args = trainer.args
    try:
        kind, given = type(trainer).get_optimizer_cls_and_kwargs(args, trainer.model)
        known = inspect.signature(kind).parameters
        kind([torch.nn.Parameter(torch.zeros(1, device=args.device))], **{k: v for k, v in given.items() if k in known})
    except Exception as error:  # each optimiser's package has errors of its own
        what = f"optim={args.optim.value!r}" if isinstance(args.optim, Enum) else f"optim={args.optim!r}"
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}; leave it out, or install it") from error
