"""`to_verl`: a recipe as verl's command line; pure, so neither verl nor TRL is needed to see it.

TRL counts per process and in optimiser steps, verl over all workers, in prompts and in rollouts. Every key has a
counterpart in verl or is an error that names it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandpo._input import InputError, is_import_path, nearest
from bandpo.engines import _adapter
from bandpo.engines._hosts import LOSS_MODE, TARGET
from bandpo.lab.recipe import SHARED, Recipe, bare, multiples, shown

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
LOSS = f"{ACTOR}.policy_loss"
# Keys that mean the same in both, and where verl has them.
DIRECT: dict[str, tuple[str, ...]] = {
    "num_generations": (f"{ROLLOUT}.n",),
    "max_completion_length": ("data.max_response_length",),
    "temperature": (f"{ROLLOUT}.temperature", f"{ROLLOUT}.val_kwargs.temperature"),
    "top_p": (f"{ROLLOUT}.top_p",),
    "learning_rate": (f"{ACTOR}.optim.lr",),
    "weight_decay": (f"{ACTOR}.optim.weight_decay",),
    "max_grad_norm": (f"{ACTOR}.optim.clip_grad",),
    "num_iterations": (f"{ACTOR}.ppo_epochs",),
    "gradient_checkpointing": (f"{MODEL}.enable_gradient_checkpointing",),
    "activation_checkpointing": (f"{MODEL}.enable_gradient_checkpointing",),  # its newer name, which wins
    "eval_samples": (f"{ROLLOUT}.val_kwargs.n",),
    "save_total_limit": ("trainer.max_actor_ckpt_to_keep",),
    "vllm_gpu_memory_utilization": (f"{ROLLOUT}.gpu_memory_utilization",),
    "trust_remote_code": ("data.trust_remote_code", f"{MODEL}.trust_remote_code"),
    "seed": ("data.seed", f"{ACTOR}.data_loader_seed", f"{ACTOR}.fsdp_config.seed", f"{ROLLOUT}.seed"),
}
# TRL and verl have other defaults for these, so a recipe must say them.
REQUIRED = (
    *("num_generations", "per_device_train_batch_size", "max_completion_length", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "weight_decay"),
)
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
OURS: dict[str, Any] = {"workers": 1, "nodes": 1, "ray_address": None, "overrides": []}  # the rest of `verl:` is verl's
LOSSES = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}
SCHEDULERS = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}
CPU_MODULE = "bandpo.engines.verl_cpu"  # the platform and the rollout that verl lacks for a CPU
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"  # a task of plain text: the prompt as it is


@dataclass(frozen=True)
class Place:
    """Where a run lies and what it starts from.

    Args:
        out: the run's folder, absolute; on a cluster on storage that every node sees.
        model: folder or Hub name that verl loads.
        plain: whether the task's prompts are plain text and not chat messages.
        model_config: fields to set in the model's configuration.
        log: file for verl's metrics.
        address: of the Ray cluster; None to start Ray here.
        resume_from: checkpoint to go on from; None for the start.
        evaluate_first: whether to evaluate before the first rollout.
    """

    out: Path
    model: str
    plain: bool
    log: Path
    model_config: dict[str, Any]
    address: str | None = None
    resume_from: Path | None = None
    evaluate_first: bool = True


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


def to_verl(recipe: Recipe, place: Place) -> list[str]:
    """Return the words after ``python -m verl.trainer.main_ppo``: hydra overrides, the recipe's own of verl's last.

    Raises:
        InputError: a key or value that cannot be translated.
    """
    plan, out, micro = schedule(recipe), place.out, recipe.per_device_train_batch_size
    values = recipe.values
    lines: dict[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": str(out / "data" / "train.parquet"),
        "data.val_files": str(out / "data" / "val.parquet"),
        "data.train_batch_size": plan.prompts,
        f"{MODEL}.path": place.model,
        **({f"{MODEL}.custom_chat_template": PLAIN_TEMPLATE} if place.plain else {}),
        **{f"+{MODEL}.override_config.{key}": value for key, value in place.model_config.items()},
        **_loss(recipe),
        f"{ACTOR}.ppo_mini_batch_size": plan.mini_batch,
        f"{ACTOR}.shuffle": True,  # as TRL does: an optimiser step's completions come from the whole rollout
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": micro,
        f"{ROLLOUT}.val_kwargs.do_sample": True,
        f"{ROLLOUT}.val_kwargs.temperature": 1.0,  # verl's is 0, which makes all samples of a prompt the same
        **{at: values[key] for key, where in DIRECT.items() if values.get(key) is not None for at in where},
        **_optimiser(recipe, plan),
        **_engine(recipe, plan, place.address),
        "reward.custom_reward_function.path": "pkg://bandpo.lab.verl.reward",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs": {
            "task": _whole(recipe.task),
            "task_args": json.dumps(_whole(recipe.task_args)),
            "rewards": json.dumps([_whole(recipe.reward_funcs), recipe.reward_weights]),
        },
        "trainer.n_gpus_per_node": ours(recipe)["workers"],
        "trainer.nnodes": ours(recipe)["nodes"],
        "trainer.total_training_steps": plan.rollouts,
        "trainer.total_epochs": plan.rollouts,  # never reached before the steps are: an epoch has a rollout at least
        "trainer.save_freq": plan.save_every,
        "trainer.test_freq": plan.test_every,
        "trainer.val_before_train": place.evaluate_first,
        **_recording(recipe, place),
    }
    return _merge(_words(lines.items()), [*_words(own(recipe)), *ours(recipe)["overrides"]])


def schedule(recipe: Recipe) -> Schedule:
    """Check that a recipe has a counterpart in verl, and work out verl's batches and lengths.

    Raises:
        InputError: a key or value that cannot be translated, or numbers that do not divide as verl needs it.
    """
    _check(recipe)
    workers = ours(recipe)["workers"] * ours(recipe)["nodes"]
    micro, n, steps = recipe.per_device_train_batch_size, recipe.num_generations, recipe.max_steps
    assert micro and n and steps  # REQUIRED
    accumulate = recipe.gradient_accumulation_steps or 1
    per_rollout = recipe.steps_per_generation or accumulate
    if per_rollout % accumulate:
        raise InputError(f"steps_per_generation={per_rollout}: must be a multiple of gradient_accumulation_steps")
    step = micro * accumulate * workers
    if step % n:
        raise InputError(
            f"per_device_train_batch_size={micro}: an optimiser step has {step} completions over {workers} workers, "
            f"which must be a multiple of num_generations={n}, because verl counts prompts; change one of them"
        )
    updates = per_rollout // accumulate * (recipe.num_iterations or 1)
    lengths = {"max_steps": steps, "save_steps": recipe.save_steps or steps, "eval_every": recipe.eval_every or steps}
    for key, count in lengths.items():
        if count % updates:
            fit = multiples(updates, count)
            raise InputError(f"{key}={count}: verl counts rollouts, each of {updates} optimiser steps; give {fit}")
    rollouts, save, test = (count // updates for count in lengths.values())
    return Schedule(workers, rollouts, updates, step * (per_rollout // accumulate) // n, step // n, save, test)


def environment(recipe: Recipe, place: Place) -> dict[str, str]:
    """Return the environment variables that the run needs beside those that are set."""
    found = {"VERL_FILE_LOGGER_PATH": str(place.log), "HYDRA_FULL_ERROR": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if recipe.threads:
        found["OMP_NUM_THREADS"] = str(recipe.threads)
    if recipe.use_cpu:
        found |= {"VERL_USE_EXTERNAL_MODULES": CPU_MODULE, "TOKENIZERS_PARALLELISM": "false"}
        if not place.address:
            found["GLOO_SOCKET_IFNAME"] = "lo"  # a laptop's own name often has no address
    return found


def ours(recipe: Recipe) -> dict[str, Any]:
    """Return the keys workers, nodes, ray_address and overrides of the `verl:` mapping."""
    return OURS | {key: recipe.verl[key] for key in OURS if recipe.verl.get(key) is not None}


def own(recipe: Recipe) -> list[tuple[str, Any]]:
    """Return what the `verl:` mapping sets of verl's own: keys with dots, and values."""
    return [(key, value) for key, value in recipe.verl.items() if key not in OURS]


def ray_address(recipe: Recipe) -> str | None:
    """Return the address of the Ray cluster that is up, as the recipe or the environment says; None to start one."""
    return ours(recipe)["ray_address"] or os.environ.get("RAY_ADDRESS")


def literal(value: Any) -> str:
    """Return a value as one word of hydra's grammar; a string is quoted where hydra would read something else."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in value.items()) + "}"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_/][\w./@-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    # A backslash means itself except before a quote.
    return '"' + re.sub(r"(\\*)($|\")", lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text) + '"'


# ---------------------------------------------------------------- what can be said without a task or a model


def _check(recipe: Recipe) -> None:
    for key in recipe.others:
        raise InputError(
            f"{recipe.where(key)}: has no counterpart in verl that bandpo knows{nearest(key, SHARED)}; leave it out, "
            "set verl's own key under 'verl:', or put TRL's under 'trl:', which verl does not read"
        )
    for key in REQUIRED:
        if getattr(recipe, key) is None:
            raise InputError(f"recipe {recipe.name}: {key} is missing; TRL's default is not verl's, so give it")
    for key in ("workers", "nodes"):
        if not isinstance(value := ours(recipe)[key], int) or isinstance(value, bool) or not 1 <= value < 10**6:
            raise InputError(f"verl.{key}={shown(value)}: must be a whole number of at least 1")
    words, address = (ours(recipe)[key] for key in ("overrides", "ray_address"))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError(f"verl.overrides={shown(words)}: must be a list of words such as trainer.balance_batch=false")
    if not isinstance(address, str | None):
        raise InputError(f"verl.ray_address={shown(address)}: must be text such as auto or host:6379")
    owned = OWNED if recipe.clip == _adapter.HOST else OWNED | REPLACED
    for key in map(bare, (*(key for key, _ in own(recipe)), *words)):
        if key in owned:
            raise InputError(f"{key} cannot be set here: {owned[key]} sets it")
    if recipe.staleness:
        raise InputError(
            f"{recipe.where('staleness')}={recipe.staleness}: bandpo verl trains each rollout when it is made; leave "
            "it out, or train with bandpo train"
        )
    if recipe.clip_metrics is not None:
        _adapter.check_how_much(recipe.clip_metrics)
    if recipe.clip != _adapter.HOST:
        _adapter.refuse_needs(_adapter.make_clip(recipe.clip, recipe.clip_args), (), "verl")
    elif recipe.clip_args:
        raise InputError(
            f"clip_args={shown(recipe.clip_args)} with clip='host': must be left out, set verl's own keys under 'verl:'"
        )
    if recipe.use_cpu and recipe.bf16:
        raise InputError("bf16=True with use_cpu: must be False on a CPU; leave it out")
    if recipe.use_vllm is False and not recipe.use_cpu:
        raise InputError(f"use_vllm=False: verl generates with an engine; leave it out, or set {ROLLOUT}.name")


# ---------------------------------------------------------------- parts of the command line


def _loss(recipe: Recipe) -> dict[str, Any]:
    lines = {f"{LOSS}._target_": TARGET, f"{LOSS}.loss_mode": LOSS_MODE, f"+{LOSS}.clip": _whole(recipe.clip)}
    if recipe.clip_args:
        lines[f"+{LOSS}.clip_args"] = _whole(recipe.clip_args)
    if recipe.clip_metrics:
        lines[f"+{LOSS}.clip_metrics"] = recipe.clip_metrics
    if recipe.loss_type is not None:  # the two have the same default
        lines[f"{ACTOR}.loss_agg_mode"] = _choice("loss_type", recipe.loss_type, LOSSES)
    if recipe.loss_type == "dr_grpo":
        lines[f"{ACTOR}.loss_scale_factor"] = recipe.max_completion_length
    if recipe.beta:
        kl = {"use_kl_loss": True, "kl_loss_coef": recipe.beta, "kl_loss_type": "low_var_kl"}
        lines |= {f"{ACTOR}.{key}": value for key, value in kl.items()}
        lines["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"] = recipe.per_device_train_batch_size
    if recipe.scale_rewards is not None:
        known = {"group": True, "none": False}
        lines["algorithm.norm_adv_by_std_in_grpo"] = _choice("scale_rewards", recipe.scale_rewards, known)
    return lines


def _whole(value: Any) -> Any:
    """The value with its files and those of its import paths made absolute: Ray's workers may run in other folders."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    if isinstance(value, str) and (is_import_path(value) and ".py:" in value or _is_file(value)):
        return str(Path(value).absolute())
    return value


def _is_file(text: str) -> bool:
    return bool(Path(text).suffix) and os.path.isfile(text)


def _optimiser(recipe: Recipe, plan: Schedule) -> dict[str, Any]:
    optim, warmup = f"{ACTOR}.optim", recipe.warmup_steps
    lines = {f"{optim}.lr_scheduler_type": _choice("lr_scheduler_type", recipe.lr_scheduler_type, SCHEDULERS)}
    if warmup and warmup < 1:
        lines[f"{optim}.lr_warmup_steps_ratio"] = warmup
    elif warmup:
        if warmup % plan.updates:
            raise InputError(f"warmup_steps={warmup:g}: must be a multiple of a rollout's {plan.updates} steps")
        lines[f"{optim}.lr_warmup_steps"] = int(warmup) // plan.updates  # verl's rate changes once a rollout
    betas = [recipe.adam_beta1, recipe.adam_beta2]
    if any(beta is not None for beta in betas):
        if None in betas:
            raise InputError("adam_beta1, adam_beta2: give both; verl takes them as a pair")
        lines[f"{optim}.betas"] = betas
    if recipe.use_peft:
        for key, at in (("lora_r", "lora_rank"), ("lora_alpha", "lora_alpha")):
            if getattr(recipe, key) is None:
                raise InputError(f"use_peft: {key} is missing; TRL's default is not verl's, so give it")
            lines[f"{MODEL}.{at}"] = getattr(recipe, key)
        if recipe.lora_target_modules:
            lines[f"{MODEL}.target_modules"] = recipe.lora_target_modules
    return lines


def _engine(recipe: Recipe, plan: Schedule, address: str | None) -> dict[str, Any]:
    """The strategy, the precision, what generates, and Ray."""
    fsdp = f"{ACTOR}.fsdp_config"
    lines: dict[str, Any] = {f"{ACTOR}.strategy": "fsdp2", f"{fsdp}.strategy": "fsdp2"}
    if recipe.use_cpu or recipe.bf16 is False:
        full = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        lines |= {f"+{fsdp}.mixed_precision": full, f"{ROLLOUT}.dtype": "float32"}
    lines[f"{ROLLOUT}.tensor_model_parallel_size"] = recipe.vllm_tensor_parallel_size or 1  # verl's default is 2
    lines[f"{ROLLOUT}.top_k"] = recipe.top_k or -1  # TRL's "all" is 0
    lines[f"{ROLLOUT}.name"] = "transformers_cpu" if recipe.use_cpu else "vllm"
    evaluated = (recipe.per_device_eval_batch_size or 0) * plan.workers
    if evaluated and evaluated < recipe.eval_prompts * recipe.eval_samples:
        lines["data.val_batch_size"] = max(1, evaluated // recipe.eval_samples)
    if recipe.use_cpu:
        lines |= {
            "trainer.device": "cpu",
            f"{ACTOR}.use_torch_compile": False,
            f"{fsdp}.use_torch_compile": False,
            f"{MODEL}.use_remove_padding": False,
            f"+{MODEL}.override_config.attn_implementation": "sdpa",
            f"{ROLLOUT}.agent.num_workers": 1,
            "reward.num_workers": 1,
            "data.dataloader_num_workers": 0,
            "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
            # verl's own looks every two seconds, longer than a small model's whole rollout takes.
            "trainer.v1.sampler.custom_sampler.path": f"pkg://{CPU_MODULE}",
            "trainer.v1.sampler.custom_sampler.name": "quick_replay_buffer",
        }
    if address:
        lines["+ray_kwargs.ray_init.address"] = address
    elif recipe.use_cpu:
        # A Ray of its own: verl asks for GPUs, and on CPU each worker takes one that exists in Ray's books only.
        lines["+ray_kwargs.ray_init.address"] = "local"
        lines["ray_kwargs.ray_init.num_cpus"] = 8 * plan.workers
        lines |= {"+ray_kwargs.ray_init.num_gpus": plan.workers, "+ray_kwargs.ray_init.include_dashboard": False}
    return lines


def _recording(recipe: Recipe, place: Place) -> dict[str, Any]:
    others = [name for name in recipe.report_to or () if name != "none"]
    start = {"trainer.resume_mode": "disable"}
    if place.resume_from:
        start = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": str(place.resume_from)}
    return {
        "trainer.project_name": "bandpo",
        "trainer.experiment_name": recipe.run_name or recipe.name,
        "trainer.logger": ["console", "file", *others],
        "trainer.default_local_dir": str(place.out / "checkpoints"),
        "trainer.validation_data_dir": str(place.out / "validation"),
        **start,
        # For Ray's processes, which may be on other nodes.
        "+ray_kwargs.ray_init.runtime_env.env_vars": environment(recipe, place),
        "hydra.run.dir": str(place.out / "hydra"),
    }


def _words(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"{key}={literal(value)}" for key, value in pairs]


def _merge(lines: list[str], last: Sequence[str]) -> list[str]:
    """Put the user's overrides in place of ours of the same key, and the rest behind."""
    found = {bare(line): line for line in lines}
    for word in last:
        key = bare(word)
        prefix = "+" if found.get(key, "").startswith("+") and not word.startswith(("+", "~")) else ""
        found[key] = prefix + word
    return list(found.values())


def _choice(key: str, value: Any, known: dict[str, Any]) -> Any:
    if value not in known:
        raise InputError(f"{key}={value!r}: verl has {', '.join(known)} of TRL's{nearest(value, known)}; choose one")
    return known[value]
