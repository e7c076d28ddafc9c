"""verl's command line for a recipe: a pure function, so neither verl nor TRL is needed to see it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandpo._input import InputError, is_import_path, nearest
from bandpo.engines._hosts import LOSS_MODE, TARGET
from bandpo.verl.recipe import ACTOR, DIRECT, LOSS, MODEL, ROLLOUT, Schedule, VerlRecipe, bare, schedule

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


def overrides(recipe: VerlRecipe, place: Place) -> list[str]:
    """Return the words after ``python -m verl.trainer.main_ppo``.

    Args:
        recipe: from `check_recipe`.
        place: where the run lies.

    Returns:
        hydra overrides, verl's own of the recipe last.

    Raises:
        InputError: a value that cannot be translated.
    """
    plan, ours, out = schedule(recipe), recipe.ours, place.out
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
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": recipe.get("per_device_train_batch_size"),
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": recipe.get("per_device_train_batch_size"),
        f"{ROLLOUT}.val_kwargs.do_sample": True,
        f"{ROLLOUT}.val_kwargs.temperature": 1.0,  # verl's is 0, which makes all samples of a prompt the same
        **{at: recipe.get(key) for key, (_, where) in DIRECT.items() if recipe.get(key) is not None for at in where},
        **_optimiser(recipe, plan),
        **_engine(recipe, plan, place.address),
        "reward.custom_reward_function.path": "pkg://bandpo.verl.reward",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs": _reward(recipe),
        "trainer.n_gpus_per_node": ours["workers"],
        "trainer.nnodes": ours["nodes"],
        "trainer.total_training_steps": plan.rollouts,
        "trainer.total_epochs": plan.rollouts,  # never reached before the steps are: an epoch has a rollout at least
        "trainer.save_freq": plan.save_every,
        "trainer.test_freq": plan.test_every,
        "trainer.val_before_train": place.evaluate_first,
        **_recording(recipe, place),
    }
    return _merge(_words(lines.items()), [*_words(recipe.own), *ours["overrides"]])


def environment(recipe: VerlRecipe, place: Place) -> dict[str, str]:
    """Return the environment variables that the run needs beside those that are set.

    Args:
        recipe: from `check_recipe`.
        place: where the run lies.

    Returns:
        Names and values.
    """
    found = {"VERL_FILE_LOGGER_PATH": str(place.log), "HYDRA_FULL_ERROR": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if recipe.get("threads"):
        found["OMP_NUM_THREADS"] = str(recipe.get("threads"))
    if recipe.get("use_cpu"):
        found |= {"VERL_USE_EXTERNAL_MODULES": CPU_MODULE, "TOKENIZERS_PARALLELISM": "false"}
        if not place.address:
            found["GLOO_SOCKET_IFNAME"] = "lo"  # a laptop's own name often has no address
    return found


def literal(value: Any) -> str:
    """Return a value as hydra's grammar writes it.

    Args:
        value: None, a bool, number, string, list or mapping.

    Returns:
        One word; a string is quoted where hydra would read anything else from it.
    """
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


# ---------------------------------------------------------------- parts of the command line


def _loss(recipe: VerlRecipe) -> dict[str, Any]:
    mode, beta, scale = recipe.get("loss_type"), recipe.get("beta"), recipe.get("scale_rewards")
    lines = {f"{LOSS}._target_": TARGET, f"{LOSS}.loss_mode": LOSS_MODE, f"+{LOSS}.clip": _whole(recipe.get("clip"))}
    if recipe.get("clip_args"):
        lines[f"+{LOSS}.clip_args"] = _whole(recipe.get("clip_args"))
    if recipe.get("clip_metrics"):
        lines[f"+{LOSS}.clip_metrics"] = recipe.get("clip_metrics")
    if mode is not None:  # the two have the same default
        lines[f"{ACTOR}.loss_agg_mode"] = _choice("loss_type", mode, LOSSES)
    if mode == "dr_grpo":
        lines[f"{ACTOR}.loss_scale_factor"] = recipe.get("max_completion_length")
    if beta:
        lines |= {f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": beta, f"{ACTOR}.kl_loss_type": "low_var_kl"}
        lines["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"] = recipe.get("per_device_train_batch_size")
    if scale is not None:
        known = {"group": True, "True": True, "none": False, "False": False}
        lines["algorithm.norm_adv_by_std_in_grpo"] = _choice("scale_rewards", scale, known)
    return lines


def _whole(value: Any) -> Any:
    """The value with the files of its import paths made absolute: Ray's workers may run in other folders."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, str) and is_import_path(value) and ".py:" in value:
        return str(Path(value).absolute())
    return value


def _optimiser(recipe: VerlRecipe, plan: Schedule) -> dict[str, Any]:
    optim, warmup = f"{ACTOR}.optim", recipe.get("warmup_steps")
    lines = {f"{optim}.lr_scheduler_type": _choice("lr_scheduler_type", recipe.get("lr_scheduler_type"), SCHEDULERS)}
    if warmup and warmup < 1:
        lines[f"{optim}.lr_warmup_steps_ratio"] = warmup
    elif warmup:
        if warmup % plan.updates:
            raise InputError(f"warmup_steps={warmup:g}: must be a multiple of a rollout's {plan.updates} steps")
        lines[f"{optim}.lr_warmup_steps"] = int(warmup) // plan.updates  # verl's rate changes once a rollout
    betas = [recipe.get("adam_beta1"), recipe.get("adam_beta2")]
    if any(beta is not None for beta in betas):
        if None in betas:
            raise InputError("adam_beta1, adam_beta2: give both; verl takes them as a pair")
        lines[f"{optim}.betas"] = betas
    if recipe.get("use_peft"):
        for key, at in (("lora_r", "lora_rank"), ("lora_alpha", "lora_alpha")):
            if recipe.get(key) is None:
                raise InputError(f"use_peft: {key} is missing; TRL's default is not verl's, so give it")
            lines[f"{MODEL}.{at}"] = recipe.get(key)
        if recipe.get("lora_target_modules"):
            lines[f"{MODEL}.target_modules"] = recipe.get("lora_target_modules")
    return lines


def _engine(recipe: VerlRecipe, plan: Schedule, address: str | None) -> dict[str, Any]:
    """The strategy, the precision, what generates, and Ray."""
    fsdp = f"{ACTOR}.fsdp_config"
    lines: dict[str, Any] = {f"{ACTOR}.strategy": "fsdp2", f"{fsdp}.strategy": "fsdp2"}
    if recipe.get("use_cpu") or recipe.get("bf16") is False:
        full = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        lines |= {f"+{fsdp}.mixed_precision": full, f"{ROLLOUT}.dtype": "float32"}
    lines[f"{ROLLOUT}.tensor_model_parallel_size"] = recipe.get("vllm_tensor_parallel_size") or 1  # verl's default is 2
    lines[f"{ROLLOUT}.top_k"] = recipe.get("top_k") or -1  # TRL's "all" is 0
    lines[f"{ROLLOUT}.name"] = "transformers_cpu" if recipe.get("use_cpu") else "vllm"
    evaluated = (recipe.get("per_device_eval_batch_size") or 0) * plan.workers
    if evaluated and evaluated < recipe.get("eval_prompts") * recipe.get("eval_samples"):
        lines["data.val_batch_size"] = max(1, evaluated // recipe.get("eval_samples"))
    if recipe.get("use_cpu"):
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
    elif recipe.get("use_cpu"):
        # A Ray of its own: verl asks for GPUs, and on CPU each worker takes one that exists in Ray's books only.
        lines["+ray_kwargs.ray_init.address"] = "local"
        lines["ray_kwargs.ray_init.num_cpus"] = 8 * plan.workers
        lines |= {"+ray_kwargs.ray_init.num_gpus": plan.workers, "+ray_kwargs.ray_init.include_dashboard": False}
    return lines


def _reward(recipe: VerlRecipe) -> dict[str, Any]:
    return {
        "task": recipe.get("task"),
        "task_args": json.dumps(recipe.get("task_args") or {}),
        "seed": recipe.get("seed") or 0,
        "eval_prompts": recipe.get("eval_prompts"),
    }


def _recording(recipe: VerlRecipe, place: Place) -> dict[str, Any]:
    others = [] if recipe.get("report_to") in (None, "none") else str(recipe.get("report_to")).split(",")
    start = {"trainer.resume_mode": "disable"}
    if place.resume_from:
        start = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": str(place.resume_from)}
    return {
        "trainer.project_name": "bandpo",
        "trainer.experiment_name": recipe.get("run_name") or recipe.name,
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
