"""The paper's own runs with verl: its configuration takes every recipe, and one smoke of each architecture trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from verl.utils.config import omega_conf_to_dataclass
from verl_support import PATIENCE

from bandpo import Band
from bandpo.lab.reading import RecipeFile, read_recipe
from bandpo.lab.recipe import load
from bandpo.lab.smoke import shrink
from bandpo.lab.verl.config import own, to_verl
from bandpo.lab.verl.run import check_keys, make_place

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
SMOKED = {"qwen2.5-3b": "Qwen2ForCausalLM", "r1-llama-8b": "LlamaForCausalLM"}


def composed(file: RecipeFile, folder: Path) -> Any:
    """verl's configuration of a recipe, as its own program makes it."""
    from hydra import compose, initialize_config_module

    recipe = load(file, backend="verl")
    check_keys([key for key, _ in own(recipe)])
    words = to_verl(recipe, make_place(recipe, folder, plain=False, make=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", [word for word in words if not word.startswith("hydra.")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_verl_is_given_the_published_values(path: Path, tmp_path: Path) -> None:
    config = composed(read_recipe(str(path)), tmp_path)
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    assert (data.train_batch_size, rollout.n, actor.ppo_mini_batch_size, actor.ppo_epochs) == (256, 16, 64, 1)
    assert (data.max_prompt_length, data.max_response_length) == (1024, 4096)
    assert config.trainer.total_training_steps == 1020 and config.trainer.n_gpus_per_node == 8
    assert (rollout.name, rollout.temperature, rollout.top_p, rollout.top_k) == ("vllm", 1.0, 1.0, -1)
    assert (actor.loss_agg_mode, actor.entropy_coeff) == ("seq-mean-token-mean", 0)
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.kl_loss_type) == (True, 0.001, "low_var_kl")
    assert config.algorithm.adv_estimator == "grpo" and config.algorithm.norm_adv_by_std_in_grpo
    assert not config.algorithm.use_kl_in_reward
    optim = actor.optim
    assert (optim.lr, optim.weight_decay, optim.clip_grad) == (1e-6, 0.01, 1.0)
    assert optim.lr_scheduler_type == "constant" and optim.lr_warmup_steps_ratio == 0
    loss = omega_conf_to_dataclass(actor.policy_loss)
    assert loss.made == Band("kl", 0.05, cap=10.0) and loss.dual_clip == 10.0
    micro = actor.ppo_micro_batch_size_per_gpu
    assert data.train_batch_size * rollout.n % (micro * 8) == 0, "the workers share a rollout evenly"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in SMOKED], ids=lambda path: path.stem)
def test_the_other_smokes_are_the_one_that_trains(path: Path, tmp_path: Path) -> None:
    this, that = (composed(shrink(read_recipe(str(p)), "verl")[0], tmp_path) for p in (path, FILES[0]))
    assert (this.trainer.experiment_name, that.trainer.experiment_name) == (path.stem, FILES[0].stem)
    this.trainer.experiment_name = that.trainer.experiment_name
    assert this == that


@pytest.mark.parametrize("name", SMOKED)
def test_a_smoke_trains_the_architecture(name: str, tmp_path: Path) -> None:
    words = ["verl", f"recipes/paper/{name}.yaml", "--smoke", "--json", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "bandpo", *words], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "BANDPO_CACHE": str(tmp_path / "models")},
    )  # fmt: skip
    log = tmp_path / "run" / "verl.log"
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(e["event"] == "note" and "verl.workers 1 (8)" in e["text"] for e in events)
    steps = [e for e in events if e["event"] == "step"]
    assert [(s["step"], s["rollout"]) for s in steps] == [(4, 1), (8, 2)]
    assert max(s["reward"] for s in steps) > 0 and max(s["grad_norm"] for s in steps) > 0
    assert all(s["clipped"] == 0 for s in steps) and any(s["actor/kl_loss"] > 0 for s in steps)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == SMOKED[name]
