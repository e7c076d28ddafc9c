"""`bandpo verl` without verl: the translation against TRL's own batches, the data, the reward, and every refusal."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bandpo import InputError, cli
from bandpo.engines._adapter import as_sums, chosen_sums
from bandpo.lab.models import source_of
from bandpo.lab.reading import RecipeFile, recipe_names
from bandpo.lab.recipe import SHARED, Recipe, load
from bandpo.lab.run.display import Display
from bandpo.lab.run.folder import RunFolder
from bandpo.lab.run.records import Eval
from bandpo.lab.run.session import Session
from bandpo.lab.trl.config import rollout_steps, to_trl
from bandpo.lab.verl import run as verl_run
from bandpo.lab.verl.collect import Collector, OtherLossError, evaluation, step_record
from bandpo.lab.verl.config import Place, literal, ours, schedule, to_verl
from bandpo.lab.verl.data import model_config, write_data
from bandpo.lab.verl.failure import explain
from bandpo.lab.verl.reward import compute_score
from bandpo.loss.stats import BRIEF, BUCKETS, FIELDS, ClipStats

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
LEAST = {
    **{"task": "addition", "model": "bandpo/tiny-addition", "num_generations": 4, "per_device_train_batch_size": 8},
    **{"max_completion_length": 5, "max_steps": 4, "learning_rate": 1e-4, "lr_scheduler_type": "constant"},
    **{"weight_decay": 0.0},
}


def check_recipe(source: str | RecipeFile, words: Sequence[str] = ()) -> Recipe:
    """A recipe that verl has counterparts for."""
    recipe = load(source, words, backend="verl")
    schedule(recipe)
    return recipe


def made(tmp_path: Path, *words: str, **keys: Any) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **keys}))
    return check_recipe(str(path), words)


def lines(recipe: Recipe, **place: Any) -> dict[str, str]:
    at = {"out": Path("/o"), "model": "/m", "plain": True, "log": Path("/o/log"), "model_config": {}, **place}
    words = to_verl(recipe, Place(**at))
    found = dict(word.split("=", 1) for word in words)
    assert len(found) == len(words), "a key stands once"
    return found


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_ships_means_the_same_to_trl_and_to_verl(name: str) -> None:
    trl, recipe = to_trl(load(name), "there"), check_recipe(name)
    plan, found = schedule(recipe), lines(recipe)
    assert plan.updates == rollout_steps(trl) and plan.rollouts * plan.updates == trl.max_steps
    completions = trl.per_device_train_batch_size * trl.steps_per_generation * plan.workers
    assert int(found["data.train_batch_size"]) * int(found[f"{ROLLOUT}.n"]) == completions
    step = trl.per_device_train_batch_size * trl.gradient_accumulation_steps * plan.workers
    assert int(found[f"{ACTOR}.ppo_mini_batch_size"]) * int(found[f"{ROLLOUT}.n"]) == step
    assert int(found["trainer.save_freq"]) * plan.updates == trl.save_steps
    assert found[f"{ACTOR}.ppo_micro_batch_size_per_gpu"] == str(trl.per_device_train_batch_size)
    assert float(found[f"{ACTOR}.optim.lr"]) == trl.learning_rate
    assert float(found[f"{ACTOR}.optim.weight_decay"]) == trl.weight_decay
    assert (
        float(found[f"{ROLLOUT}.temperature"]) == float(found[f"{ROLLOUT}.val_kwargs.temperature"]) == trl.temperature
    )
    assert found[f"{ACTOR}.policy_loss._target_"] == "bandpo.engines.verl.BandLossConfig"
    assert found[f"+{ACTOR}.policy_loss.clip_args"] == "{divergence:kl,delta:0.05,cap:10.0}"
    # What `bandpo train` leaves as recipe.yaml, with all that it has filled in, is a recipe for verl as well.
    again = check_recipe(RecipeFile(name, yaml.safe_load(load(name).dump())))
    assert again.values == check_recipe(name).values and lines(again) == found


@pytest.mark.parametrize("key", sorted(SHARED - {"trl", "verl", "task", "model", "staleness", "eval_prompts"}))
def test_every_shared_key_changes_what_verl_is_told(key: str, tmp_path: Path) -> None:
    """None is taken and then forgotten. The values differ from what the recipe has and from verl's defaults.

    staleness is refused, and eval_prompts is the length of val.parquet: other tests.
    """
    values: dict[str, Any] = {
        "task_args": {"digits": 2}, "clip": "fixed", "clip_args": {"delta": 0.2}, "clip_metrics": "none",
        "lr_scheduler_type": "cosine", "loss_type": "grpo", "scale_rewards": "none", "report_to": ["wandb"],
        "run_name": "x", "lora_target_modules": ["q"], "top_p": 0.5, "vllm_gpu_memory_utilization": 0.3,
        "adam_beta1": 0.8, "adam_beta2": 0.8, "max_steps": 8, "save_steps": 2, "eval_every": 2, "bf16": False,
        "num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "threads": 3,
        "per_device_eval_batch_size": 16, "num_generations": 8, "reward_funcs": ["accuracy_reward"],
        "reward_weights": [2],
    }  # fmt: skip
    beside = {"adam_beta1": 0.7, "adam_beta2": 0.7, "use_peft": True, "lora_r": 4, "lora_alpha": 4, "seed": 1}
    beside |= {"trust_remote_code": False, "gradient_checkpointing": False}
    true = ("use_cpu", "trust_remote_code", "activation_checkpointing", "gradient_checkpointing")
    value = values.get(key, True if key in true else False if key == "use_peft" else 16)
    if key == "use_vllm":  # says what verl does anyway; without it there has to be a CPU
        with pytest.raises(InputError, match="verl generates with an engine"):
            made(tmp_path, **beside, use_vllm=False)
        return
    before, after = made(tmp_path, **beside), made(tmp_path, **beside | {key: value})
    at = {"out": Path("/o"), "model": "/m", "plain": True, "log": Path("/o/log"), "model_config": {}}
    if key == "threads":
        assert verl_run.environment(after, Place(**at)) != verl_run.environment(before, Place(**at))
    else:
        assert set(to_verl(before, Place(**at))) != set(to_verl(after, Place(**at)))


def test_what_a_recipe_leaves_out_is_trls_default_and_said_once(tmp_path: Path) -> None:
    """verl's loss_agg_mode is left to verl, whose default is tested in tests/verl; the clip is named in run.json."""
    from trl import GRPOConfig

    assert GRPOConfig.__dataclass_fields__["loss_type"].default == "dapo"
    recipe = made(tmp_path)
    found = lines(recipe)
    assert f"{ACTOR}.loss_agg_mode" not in found and found[f"+{ACTOR}.policy_loss.clip"] == "band"
    assert recipe.values["clip"] == "band"


def test_only_the_verl_demo_is_for_verl_alone(tmp_path: Path) -> None:
    recipe = check_recipe("verl-demo")
    assert ours(recipe)["workers"] == 2 and recipe.use_cpu is True
    found = lines(recipe)
    assert found[f"{ROLLOUT}.name"] == "transformers_cpu" and found["+ray_kwargs.ray_init.num_gpus"] == "2"
    gpu = lines(made(tmp_path, verl={"workers": 8, "nodes": 2}, per_device_eval_batch_size=8))
    assert gpu[f"{ROLLOUT}.name"] == "vllm" and gpu["trainer.n_gpus_per_node"] == "8" and gpu["trainer.nnodes"] == "2"
    assert gpu["data.train_batch_size"] == "32" and gpu["data.val_batch_size"] == "32"
    assert not any("cpu" in key + value for key, value in gpu.items()), "the extras of a CPU are for use_cpu only"


def test_keys_are_translated(tmp_path: Path) -> None:
    keys = {"loss_type": "dr_grpo", "beta": 0.01, "scale_rewards": "none", "num_iterations": 2, "warmup_steps": 2}
    more = {"adam_beta1": 0.9, "adam_beta2": 0.95, "use_peft": True, "lora_r": 8, "lora_alpha": 16, "top_k": 0}
    some = {"report_to": ["wandb"], "run_name": "a b", "save_total_limit": 3, "activation_checkpointing": False}
    found = lines(made(tmp_path, bf16=False, **keys, **more, **some, seed=7))
    assert found[f"{ACTOR}.loss_agg_mode"] == "seq-mean-token-sum-norm" and found[f"{ACTOR}.loss_scale_factor"] == "5"
    assert found[f"{ACTOR}.use_kl_loss"] == "true" and found[f"{ACTOR}.kl_loss_coef"] == "0.01"
    assert found["algorithm.norm_adv_by_std_in_grpo"] == "false" and found[f"{ACTOR}.ppo_epochs"] == "2"
    assert found[f"{ACTOR}.optim.lr_warmup_steps"] == "1" and found[f"{ACTOR}.optim.betas"] == "[0.9,0.95]"
    assert found["actor_rollout_ref.model.lora_rank"] == "8" and found[f"{ROLLOUT}.top_k"] == "-1"
    assert found["trainer.logger"] == "[console,file,wandb]" and found["trainer.experiment_name"] == '"a b"'
    assert found["trainer.total_training_steps"] == "2" and found["data.seed"] == found[f"{ROLLOUT}.seed"] == "7"
    assert "fp32" in found[f"+{ACTOR}.fsdp_config.mixed_precision"]
    resumed = lines(made(tmp_path), resume_from=Path("/o/c/global_step_1"), evaluate_first=False, plain=False)
    assert resumed["trainer.resume_mode"] == "resume_path" and resumed["trainer.val_before_train"] == "false"
    assert "actor_rollout_ref.model.custom_chat_template" not in resumed


def test_verls_own_keys_come_last_and_are_kept_with_the_recipe(tmp_path: Path) -> None:
    own = {
        "actor_rollout_ref": {"rollout": {"name": "sglang", "gpu_memory_utilization": 0.6}},
        "data.max_prompt_length": 9,
    }
    recipe = made(tmp_path, "data.max_prompt_length=16", "+a.b={c:1}", f"{ACTOR}.policy_loss.dual_clip=10", verl=own)
    found = lines(recipe)
    assert found[f"{ROLLOUT}.name"] == "sglang" and found[f"{ROLLOUT}.gpu_memory_utilization"] == "0.6"
    assert found["data.max_prompt_length"] == "16" and found["+a.b"] == "{c:1}"
    again = check_recipe(RecipeFile("again", yaml.safe_load(yaml.safe_dump(recipe.values))))
    assert lines(again) | {"trainer.experiment_name": "mine"} == found
    words = made(tmp_path, "--clip", "fixed", "--clip_args.eps_high=0.3", "--use_cpu", "--seed=3").values
    assert words["clip_args"] == {"eps_high": 0.3} and words["use_cpu"] is True and words["seed"] == 3


def test_every_kind_of_clip_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = f"+{ACTOR}.policy_loss"
    sides = {"high": {"clip": "band", "delta": 0.05}, "low": {"clip": "fixed", "eps_low": 0.2}}
    found = lines(made(tmp_path, clip="sides", clip_args=sides, clip_metrics="full"))
    assert found[f"{loss}.clip"] == "sides" and found[f"{loss}.clip_metrics"] == "full"
    assert found[f"{loss}.clip_args"] == "{high:{clip:band,delta:0.05},low:{clip:fixed,eps_low:0.2}}"
    assert (
        f"{loss}.clip_args" not in (found := lines(made(tmp_path, "--clip", "sapo")))
        and found[f"{loss}.clip"] == "sapo"
    )
    assert f"{loss}.clip_metrics" not in found, "the loss's own default"
    own = {f"{ACTOR}.clip_ratio_high": 0.28, f"+{ACTOR}.policy_loss.host_loss_mode": "gspo"}
    found = lines(made(tmp_path, clip="host", verl=own))
    assert found[f"{loss}.clip"] == "host" and found[f"{ACTOR}.clip_ratio_high"] == "0.28"
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import bandpo\nclass Half:\n    def coefficient(self, tokens):\n        return tokens.weighted / 2\n"
        "mine = bandpo.get_divergence('js')\n"
    )
    found = lines(made(tmp_path, clip="mine.py:Half"))
    assert found[f"{loss}.clip"] == f'"{tmp_path}/mine.py:Half"', "the workers may run elsewhere"
    found = lines(made(tmp_path, clip="dgpo", clip_args={"region": {"clip": "band", "divergence": "mine.py:mine"}}))
    assert found[f"{loss}.clip_args"] == f'{{region:{{clip:band,divergence:"{tmp_path}/mine.py:mine"}}}}'


REFUSED = {
    "--max_stesp 3": "did you mean 'max_steps'?",
    "--min_p 0.1": "has no counterpart in verl",
    "--loss_type cispo": "verl has dapo, grpo, dr_grpo",
    "--lr_scheduler_type linear": "verl has constant",
    "--trl.min_p 0.1 --min_p 0.1": "or put TRL's under 'trl:', which verl does not read",
    "--scale_rewards batch": "scale_rewards='batch'",
    "--epsilon 0.1": "clip: fixed",
    "--delta 3": "clip_args.delta; verl caps ratios with a dual clip",
    "--num_train_epochs 3": "give max_steps",
    "--clip bnd": "(did you mean 'band'?)",
    "--clip_args.dela 0.1": "(did you mean 'delta'?)",
    "--clip host --clip_args.delta 0.1": "must be left out, set verl's own keys",
    "--clip_metrics fulll": "(did you mean 'full'?)",
    f"+{ACTOR}.policy_loss.clip_metrics=full": "clip_metrics sets it",
    "--task additoin": "(did you mean 'addition'?)",
    "--max_steps 3.5": "--max_steps=3.5: must be a whole number",
    "--max_steps": "needs a value",
    "--max_steps.x 3": "max_steps takes one value, not a mapping",
    "--max_steps 5 --steps_per_generation 4": "each of 4 optimiser steps; give 4 or 8",
    "--num_generations 3": "must be a multiple of num_generations=3",
    "--steps_per_generation 3 --gradient_accumulation_steps 2": "must be a multiple of gradient_accumulation_steps",
    "--eval_prompts 0": "eval_prompts=0",
    "--learning_rate 0": "learning_rate",
    "--use_cpu --bf16 true": "bf16=True with use_cpu",
    "--disable_tqdm false": "--disable_tqdm: has no counterpart in verl",
    "--logging_steps 3": "--logging_steps: has no counterpart in verl",
    "--verl.ray_address 3": "verl.ray_address=3: must be text",
    "--verl.overrides x": "must be a list of words",
    "--hf_token=x": "is a secret",
    "+a.b={WANDB_API_KEY:x}": "WANDB_API_KEY is a secret",
    "--verl.workers 0": "verl.workers=0",
    "--staleness 1": "--staleness=1: bandpo verl trains each rollout when it is made; leave it out",
    "--use_peft": "lora_r is missing",
    "--adam_beta1 0.9": "give both",
    "--warmup_steps 3 --steps_per_generation 2": "must be a multiple of a rollout's 2 steps",
    "stray": "'stray' belongs to no key",
    "trainer.save_freq=3": "save_steps sets it",
    f"{ACTOR}.clip_ratio_c=10": "dual_clip",
    "--verl.trainer.nnodes 2": "verl.nodes sets it",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_verl_has_no_counterpart_for_is_one_line(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(LEAST))
    out = tmp_path / "run"
    assert cli.main(["verl", str(tmp_path / "mine.yaml"), *words.split(), "--print", "--out", str(out)]) == 2
    printed, said = capsys.readouterr()
    assert REFUSED[words] in said and said.count("\n") == 1 and printed == "" and not out.exists()


@pytest.mark.parametrize("key", ["weight_decay", "lr_scheduler_type", "max_steps", "num_generations"])
def test_a_key_whose_defaults_differ_must_be_given(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in LEAST.items() if k != key}))
    with pytest.raises(InputError, match=f"{key} is missing"):
        check_recipe(str(path))


def test_values_in_hydras_grammar() -> None:
    told = {"a": 1, "b": [True, None, 1e-5], "c": "x y"}
    assert literal(told) == '{a:1,b:[true,null,1e-05],c:"x y"}'
    for text, written in {
        "kl": "kl", "/a/b-1.0": "/a/b-1.0", "true": '"true"', "1e3": '"1e3"', "": '""', "a=b": '"a=b"',
        'say "x"': '"say \\"x\\""',
        "C:\\": '"C:\\\\"', "\\d": '"\\d"', "{{ m }}": '"{{ m }}"',
    }.items():  # fmt: skip
        assert literal(text) == written


def test_help_teaches_and_waits_for_no_framework() -> None:
    code = (
        "import sys, bandpo.cli\n"
        "try: bandpo.cli.main(['verl', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'trl', 'transformers', 'datasets', 'verl', 'yaml'} & set(sys.modules))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "  bandpo verl verl-demo --print" in said and "key=value" in said and said.endswith("set()\n")


def test_print_needs_no_verl_writes_nothing_and_a_shell_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["verl", "verl-demo", "--print", "--out", "a b"]) == 0
    printed = capsys.readouterr().out
    # The words as the program would get them: a shell's own reading of the line.
    program = printed.replace(
        "python -m verl.trainer.main_ppo", f"{sys.executable} -c 'import sys,json;print(json.dumps(sys.argv[1:]))'"
    )
    words = json.loads(subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True).stdout)
    recipe = check_recipe("verl-demo")
    place = verl_run.make_place(recipe, tmp_path / "a b", plain=True, make=False)
    assert words == to_verl(recipe, place) and "VERL_USE_EXTERNAL_MODULES=bandpo.engines.verl_cpu" in printed
    assert list(tmp_path.iterdir()) == []


def test_prepare_writes_what_the_printed_line_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verl", "verl-demo", "--prepare", "--out", str(tmp_path / "r"), "--eval_prompts", "5"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for file in re.findall(r"data\.(?:train|val)_files=(\S+)", told["command"]):
        assert Path(file).is_file() and str(Path(file).parent) == told["data"]
    assert cli.main(words) == 0, "it may be prepared again"


def test_data_and_reward_go_round(tmp_path: Path) -> None:
    from datasets import Dataset

    recipe = check_recipe("verl-demo", ["--task_args.digits", "2", "--eval_prompts", "6"])
    task = recipe.make_task()
    plain = isinstance(task.eval_dataset(1)[0]["prompt"], str)
    write_data(task, tmp_path, seed=0, eval_prompts=6)
    rows = {split: list(Dataset.from_parquet(str(tmp_path / f"{split}.parquet"))) for split in ("train", "val")}
    assert plain and len(rows["val"]) == 6 and len(rows["train"]) == 8192
    questions = {split: {row["extra_info"]["question"] for row in part} for split, part in rows.items()}
    assert not questions["train"] & questions["val"], "held out"
    given = {"task": "addition", "task_args": '{"digits": 2}'}
    for row in rows["val"]:
        a, b = map(int, row["prompt"][0]["content"].rstrip("=").split("+"))
        right = row["reward_model"]["ground_truth"]
        assert int(right) == a + b
        for text, reward in ((right, 1.0), (right + "0", 0.0), ("", 0.0)):
            scored = compute_score(
                row["data_source"], text, right, row["extra_info"], reward_router_address=None, **given
            )
            assert scored == {"score": reward, "acc": reward, "question": f"{a}+{b}="}


def test_a_scorer_that_needs_the_whole_problem_gets_it(tmp_path: Path) -> None:
    """Such a scorer goes by a problem's metadata; the parquet holds where that comes from."""
    from datasets import Dataset

    recipe = made(tmp_path, task="reasoning-gym:countdown", task_args={"train_size": 4}, eval_prompts=3)
    task = recipe.make_task()
    write_data(task, tmp_path, seed=0, eval_prompts=3)
    given = {"task": "reasoning-gym:countdown", "task_args": '{"train_size": 4}'}
    rows = Dataset.from_parquet(str(tmp_path / "val.parquet"))
    for row, told in zip(task.eval_dataset(3), rows, strict=True):
        assert told["prompt"] == row["prompt"]
        for text, reward in ((task.gold(row), 1.0), ("<answer>1</answer>", 0.0)):
            right = told["reward_model"]["ground_truth"]
            assert compute_score("countdown", text, right, told["extra_info"], **given)["score"] == reward


def test_a_grader_with_an_alarm_works_in_a_thread(tmp_path: Path) -> None:
    """verl calls the reward from threads, where math-verify's time limit cannot be set."""
    given = {"task": "chain_sum", "task_args": '{"train_size": 4}'}
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(compute_score, "chain_sum", text, "7", {}, **given) for text in ("it is 7.", "8")]
        assert [job.result()["score"] for job in jobs] == [1.0, 0.0]


def test_the_models_configuration_gets_what_verl_misses(tmp_path: Path) -> None:
    source = source_of("bandpo/tiny-addition", make=False)
    assert model_config(source) == {"architectures": ["GPT2ForCausalLM"], "num_key_value_heads": 4}
    assert model_config("Qwen/Qwen2.5-7B") == {} and source_of("Qwen/Qwen2.5-7B", make=False) == "Qwen/Qwen2.5-7B"
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}')
    assert model_config(source_of(str(tmp_path), make=False)) == {}
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="holds no model"):
        model_config(str(tmp_path))


# ---------------------------------------------------------------- before verl is started


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(verl_run, "installed_version", lambda name: versions.get(name))


def test_what_is_not_installed_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch)
    assert cli.main(["verl", "verl-demo", "--out", str(tmp_path / "r")]) == 2
    out, said = capsys.readouterr()
    assert 'pip install ".[verl]"' in said and said.count("\n") == 1 and out == "" and not (tmp_path / "r").exists()
    cpu, gpu = made(tmp_path, use_cpu=True), made(tmp_path, verl={"workers": 64})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    installed(monkeypatch, verl="0.8.1")
    with pytest.raises(InputError, match="verl==0.8.1: must be 0.9"):
        verl_run.check_engine(cpu)
    installed(monkeypatch, verl="0.9.1")
    with pytest.raises(InputError, match="TransferQueue is not installed"):
        verl_run.check_engine(cpu)
    verl_run.check_engine(made(tmp_path, "trainer.use_v1=false", use_cpu=True))
    installed(monkeypatch, verl="0.9.1", TransferQueue="0.1.11")
    verl_run.check_engine(cpu)
    with pytest.raises(InputError, match="vllm is not installed"):
        verl_run.check_engine(gpu)
    installed(monkeypatch, verl="0.9.1", TransferQueue="0.1.11", vllm="0.24.0")
    with pytest.raises(InputError, match=r"workers x verl.nodes=64: this machine has \d+ GPUs"):
        verl_run.check_engine(gpu)
    fsdp, megatron = ["trainer.test_freq", "trainer.balance_batch"], [f"{ACTOR}.megatron.use_mbridge"]
    monkeypatch.setattr(verl_run, "known_keys", lambda every_engine: fsdp + megatron * every_engine)
    with pytest.raises(InputError, match=r"balance_bach: .*did you mean 'trainer.balance_batch'"):
        verl_run.check_engine(made(tmp_path, "trainer.balance_bach=false", use_cpu=True))
    verl_run.check_engine(made(tmp_path, "trainer.balance_batch=false", "+trainer.new=1", use_cpu=True))
    # Groups bring keys that the default configuration does not have; the other keys are checked all the same.
    for words in (["model_engine=megatron", f"{megatron[0]}=true"], ["mine@reward=other", "reward.new=1"]):
        verl_run.check_keys(words)
        with pytest.raises(InputError, match="did you mean 'trainer.balance_batch'"):
            verl_run.check_keys([*words, "trainer.balance_bach=false"])


def test_a_ray_address_is_tried_before_verl_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, verl="0.9.1", TransferQueue="0.1.11")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        recipe = made(tmp_path, use_cpu=True, verl={"ray_address": f"ray://127.0.0.1:{port}"})
        verl_run.check_engine(recipe)
        found = lines(recipe, address=verl_run.make_place(recipe, tmp_path, plain=True, make=False).address)
        assert found["+ray_kwargs.ray_init.address"] == f'"ray://127.0.0.1:{port}"'
        assert "ray_kwargs.ray_init.num_cpus" not in found, "a cluster that is up has its own"
    with pytest.raises(InputError, match="nothing answers there"):
        verl_run.check_engine(recipe)
    verl_run.check_address("auto")


# ---------------------------------------------------------------- while verl runs


def clip_metrics(tokens: dict[str, float], above: dict[str, float], how_much: str = "full") -> dict[str, float]:
    """What the loss reports of tokens with A > 0, a mean over micro-batches."""
    sums = torch.zeros(3, len(BUCKETS), len(FIELDS), dtype=torch.float64)
    for name, counts in (("tokens", tokens), ("zero_grad_above", above)):
        sums[2, :, FIELDS.index(name)] = torch.tensor([counts.get(bucket, 0.0) for bucket in BUCKETS])
    stats = ClipStats(sums, torch.zeros(3, len(BUCKETS), 3))
    return chosen_sums(as_sums(stats), how_much, "actor/clip/")


def step_line(rollout: int, *, ours: bool = True, val: bool = False) -> str:
    data = {"actor/pg_loss": 0.1, "critic/score/mean": rollout / 10, "actor/entropy": 0.5, "timing_s/step": 2.0}
    data |= clip_metrics({"p0-0.01": 10.0, "p0.5-0.9": 30.0}, {"p0-0.01": 4.0}) if ours else {"actor/pg_clipfrac": 0.2}
    data |= {"val-core/addition/acc/mean@2": 0.5} if val else {}
    return json.dumps({"step": rollout, "data": data}) + "\n"


def samples_file(folder: Path, rollout: int, right: list[list[int]]) -> None:
    path = folder / "validation" / f"{rollout}.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "input": f"{i}+1=",
            "question": f"{i}+1=",
            "output": f"{rollout}",
            "gts": "2",
            "acc": float(x),
            "uid": f"u-{i}_{k}_0",
        }
        for i, answers in enumerate(right)
        for k, x in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Seen(Display):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def collector(tmp_path: Path, start: int = 0) -> Collector:
    recipe = made(tmp_path, max_steps=8, steps_per_generation=2, eval_prompts=2, eval_samples=2)
    session = Session(recipe, RunFolder(tmp_path / "run"), Seen(), "verl", "bandpo verl mine.yaml")
    session.begin(seed=0, workers=1)
    return Collector(session, schedule(recipe), log=tmp_path / "log.jsonl", start=start)


def test_verls_log_becomes_the_records_of_a_run(tmp_path: Path) -> None:
    found = collector(tmp_path)
    found.poll()
    log = found.log.open("w")
    folder = found.session.folder
    samples_file(folder.path, 0, [[1, 0], [0, 0]])
    log.write(json.dumps({"step": 0, "data": {"val-core/addition/acc/mean@2": 0.25}}) + "\n" + step_line(1)[:40])
    log.flush()
    found.poll()
    assert folder.records() == [] and folder.facts.before.accuracy == 0.25, "half a line waits"
    log.write(step_line(1)[40:] + step_line(2, val=True))
    log.flush()
    found.poll()
    assert [r.step for r in folder.records()] == [2, 4], "two optimiser steps a rollout"
    samples_file(folder.path, 2, [[1, 1], [0, 1]])
    found.poll()
    log.write(step_line(3) + step_line(4, val=True))
    log.close()
    samples_file(folder.path, 4, [[1, 1], [1, 1]])
    found.poll(last=True)
    records = folder.records()
    evals = [r for r in records if isinstance(r, Eval)]
    assert [(r.step, r.accuracy) for r in evals] == [(4, 0.75)] and evals[0].low < 0.75 < evals[0].high
    last = records[-1]
    assert (last.step, last.rollout, last.seconds, last.reward, last.entropy) == (8, 4, 8.0, 0.4, 0.5)
    number = last.number
    assert last.clipped == number("clip/zero_grad_above") == pytest.approx(0.1)
    assert number("clip/zero_grad_above/p0-0.01") == number("clip/zero_grad/pos/p0-0.01") == pytest.approx(0.4)
    assert number("clip/share/p0.5-0.9") == 0.75 and number("clip/share/p0.1-0.5") == number("clip/zero_grad/neg") == 0
    assert folder.facts.after.accuracy == 1.0
    shown = [event for event in found.session.display.events if event["event"] == "step"]
    assert [event["left"] for event in shown] == [6.0, 4.0, 2.0, 0.0] and shown[0]["steps"] == 8
    assert found.samples_before_and_after()[0].model_dump() == {
        "prompt": "0+1=", "answer": "2", "before": "0", "correct_before": True, "after": "4", "correct_after": True,
    }  # fmt: skip


def test_a_run_of_verl_has_a_report(tmp_path: Path) -> None:
    from bandpo.lab.report.page import write_report

    found = collector(tmp_path)
    found.log.write_text("".join(step_line(i) for i in range(1, 5)))
    for rollout, right in ((0, [[0, 0], [0, 1]]), (4, [[1, 1], [1, 1]])):
        samples_file(found.session.folder.path, rollout, right)
        found._evaluation(rollout)
    found.poll(last=True)
    page = write_report([found.session.folder.path], tmp_path / "r.html").read_text("utf-8")
    for text in (
        "verl, 1 workers",
        "25.0 %",
        "100.0 %",
        "4 rollouts, 8 optimiser steps",
        "0.50 → 0.50",
        "verl keeps none",
    ):
        assert text in page, text
    assert page.count("<svg") == 7, "six curves and the buckets"


def test_another_loss_is_noticed_in_the_first_rollout(tmp_path: Path) -> None:
    found = collector(tmp_path)
    found.log.write_text(step_line(1, ours=False))
    with pytest.raises(OtherLossError, match="another loss trains"):
        found.poll()


def test_verls_own_loss_and_one_without_metrics_are_not_taken_for_another(tmp_path: Path) -> None:
    found = collector(tmp_path)
    found.measured = False
    found.log.write_text(step_line(1, ours=False))
    found.poll()
    (record,) = found.session.folder.records()
    assert record.number("actor/pg_clipfrac") == 0.2 and not any(key.startswith("clip") for key in record.as_dict())


def test_a_failed_request_leaves_its_prompt_out() -> None:
    rows = [{"uid": f"a-{i}_{k}_0", "acc": float(i == 0)} for i in range(3) for k in range(2)][:-1]
    found = evaluation(rows)
    assert (found.accuracy, found.n) == (0.5, 4)


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    found = step_record({"actor/lr": math.nan, "x": "text", "actor/grad_norm": 1.5, **clip_metrics({}, {})})
    assert found["grad_norm"] == 1.5 and not {"learning_rate", "x"} & set(found) and found["clipped"] == 0.0


def test_brief_sums_are_the_same_shares_without_buckets() -> None:
    """Averages may be below one token: a fifth of a token, a tenth of it clipped, is a half."""
    made = {"p0-0.01": 0.2, "p0.5-0.9": 0.6}, {"p0-0.01": 0.1}
    full, brief = (step_record(clip_metrics(*made, how_much)) for how_much in ("full", "brief"))
    assert full["clip/zero_grad_above/p0-0.01"] == 0.5 and full["clipped"] == brief["clipped"] == 0.125
    assert brief == {key: x for key, x in full.items() if key in brief} and not any("/p" in key for key in brief)
    assert {key.removeprefix("clip/") for key in brief} == {*BRIEF, "clipped"} - {"capped"}
    assert step_record(clip_metrics(*made, "none")) == {}


def test_a_checkpoint_counts_when_it_is_whole_and_something_is_left_to_do(tmp_path: Path) -> None:
    found = collector(tmp_path)
    folder, session = found.session.folder.checkpoints, found.session
    for step, files in {1: "da", 2: "da", 3: "d", 4: "da"}.items():
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
        for key, name in (("d", "data.pt"), ("a", "actor/fsdp_config.json")):
            if key in files:
                (folder / f"global_step_{step}" / name).touch()
    assert verl_run.last_checkpoint(session).number == 2, "the last of four rollouts leaves nothing to do"
    longer = Session(
        load(RecipeFile("x", session.recipe.values), ["--max_steps", "10"]), *[session.folder, Seen(), "verl", ""]
    )
    assert verl_run.last_checkpoint(longer).number == 4
    # Sealed by whoever follows verl, once verl says that it is written.
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    found.poll()
    assert (folder / "global_step_2" / "bandpo.json").exists() and not (
        folder / "global_step_1" / "bandpo.json"
    ).exists()
    (folder / "global_step_2" / "data.pt").write_text("cut or grown")
    kept = verl_run.last_checkpoint(session)
    assert kept.number == 1 and list(kept.unusable.values()) == ["data.pt is damaged"]


LOGS = {
    "Could not override 'trainer.tst_freq'.\nKey 'tst_freq' is not in struct": "trainer.tst_freq: verl has no such key",
    "\x1b[36m(Runner pid=7)\x1b[0m Traceback\n\x1b[36m(Runner pid=7)\x1b[0m KeyError: 'x'\n"
    "ray.exceptions.RayTaskError(KeyError): ray::Runner.run() (pid=7)\nKeyError: 'x'\n\nSet HYDRA": "KeyError: 'x'",
    "ValueError: Total available GPUs 0 is less than total desired GPUs 8": "Ray has 0 GPUs and the recipe asks for 8",
    "RuntimeError: Failed to connect to GCS.\nray.exceptions.AuthenticationError: RPC": "RAY_AUTH_MODE=token",
    "ConnectionError: Could not find any running Ray instance. Please": "no Ray cluster answers",
    "(Loop pid=3) ERROR:Error in _run_prompt for uid=1\n(Loop pid=3) Traceback\n(Loop pid=3) OSError: no room\n"
    "(Loop pid=3) ERROR:Error in _run_prompt for uid=2\n(Loop pid=3) KeyError: 1\n"
    "RuntimeError: Sync replay buffer selected terminal groups with no materializable trajectories": "OSError: no room",
    "RuntimeError: Connection closed by peer\nray.exceptions.ActorDiedError: The actor died unexpectedly before": (
        "a worker was lost"
    ),
    "RuntimeError: Failed to connect to GCS.\nray.exceptions.ActorDiedError: The actor died unexpectedly": (
        "a worker was lost"
    ),
    "(WorkerDict pid=7) bandpo._input.InputError: clip_ratio=0.1: must be left out\n(raylet) A worker died of an "
    "unexpected system error\nray.exceptions.ActorDiedError: The actor died unexpectedly": "InputError: clip_ratio=0.1",
    "Error in call to target 'a.BandLossConfig':\nInputError(\"delta=0\")": "a.BandLossConfig refuses its settings: In",
    "": "it printed nothing",
}


@pytest.mark.parametrize("log", LOGS)
def test_the_reason_is_found_in_the_log(log: str) -> None:
    assert LOGS[log] in explain(log) and "\n" not in explain(log)


FAKE = """
import json, os, sys, time
log = os.environ["VERL_FILE_LOGGER_PATH"]
print("ValueError: out of luck")
{}
"""


def fake_verl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Another program in verl's place: it gets verl's arguments and environment."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(body))
    starter = tmp_path / "python"
    starter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr(verl_run.sys, "executable", str(starter))
    monkeypatch.setattr(verl_run, "check_engine", lambda recipe: None)


def test_a_run_that_verl_gives_up_says_why_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_verl(monkeypatch, tmp_path, f"open(log, 'w').write({step_line(1)!r})\nsys.exit(3)")
    assert cli.main(["verl", "verl-demo", "--out", "r"]) == 1
    out, said = capsys.readouterr()
    assert "exit code 3: ValueError: out of luck" in said and "start again with another --out" in said
    info = json.loads(Path("r/run.json").read_text())
    assert info["status"] == "failed" and "out of luck" in info["error"]
    assert [record.step for record in RunFolder(Path("r")).records()] == [8]
    whole = Path("r/checkpoints/global_step_1/actor")
    whole.mkdir(parents=True)
    for file in (whole / "fsdp_config.json", whole.parent / "data.pt"):
        file.touch()
    assert cli.main(["verl", "verl-demo", "--out", "r", "--resume"]) == 1
    out, said = capsys.readouterr()
    assert (
        "from step 8" in out
        and "the checkpoint of step 8 is good; go on with: bandpo verl verl-demo --out r --resume" in said
    )
    assert cli.main(["verl", "verl-demo", "--out", "r", "--resume", "--seed", "1"]) == 2
    assert "seed=1, but the run" in capsys.readouterr().err
    assert cli.main(["verl", "verl-demo", "--out", "r"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_another_loss_ends_verl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verl(monkeypatch, tmp_path, f"open(log, 'w').write({step_line(1, ours=False)!r})\ntime.sleep(100)")
    words = ["verl", "verl-demo", "--steps_per_generation", "1", "--out", str(tmp_path / "r")]
    assert cli.main(words) == 1
    out, said = capsys.readouterr()
    assert "another loss trains" in said and "no clip can act" in out, "one update a rollout"


def test_a_schedulers_end_of_the_job_ends_verl_as_well(tmp_path: Path) -> None:
    body = "import signal\nopen(log + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(100)"
    (tmp_path / "go.py").write_text(
        "import sys, pathlib, pytest\nfrom test_verl_command import fake_verl\nfrom bandpo import cli\n"
        "with pytest.MonkeyPatch.context() as patch:\n"
        f"    fake_verl(patch, pathlib.Path({str(tmp_path)!r}), {body!r})\n"
        f"    sys.exit(cli.main(['verl', 'verl-demo', '--out', {str(tmp_path / 'r')!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "go.py")], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    waiting = tmp_path / "r" / "verl" / "metrics-1.jsonl.pid"
    deadline = time.monotonic() + 300
    while not waiting.exists() or not waiting.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "interrupted; go on with: bandpo verl verl-demo" in said
    assert not Path(f"/proc/{waiting.read_text()}").exists()
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "interrupted"
