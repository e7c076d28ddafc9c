"""A tiny model, a task and verl's command for it: real runs on a local Ray, without a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

PATIENCE = 900.0  # seconds, for a machine that does other things too; a start takes 40 on two idle cores
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    text = solution_str.replace("<|im_end|>", "")
    return sum(x.isdigit() for x in text) / max(len(text), 1)
"""
ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "bandpo.engines.verl_cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONWARNINGS": "ignore",
}


def make_world(folder: Path) -> None:
    """Write a model, a tokenizer, prompts and a reward (the share of digits) into a folder."""
    characters = [bytes_to_unicode()[ord(c)] for c in "0123456789abcdefgh+=- \n"]
    # verl wants "\n" as one token and <|im_end|>; transformers makes every tokenizer of a Qwen2 a Qwen2Tokenizer.
    words = [*characters, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    for name, size in (("train", 256), ("val", 8)):
        rows = [
            {
                "data_source": "digits",
                "prompt": [{"role": "user", "content": f"{n % 10}+{n % 7}="}],
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": n},
            }
            for n in range(size)
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    (folder / "reward.py").write_text(REWARD)


def overrides(folder: Path, workers: int, steps: int) -> dict[str, Any]:
    """verl's settings: GRPO with Band, four updates a rollout, everything tiny."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    exact = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"  # verl computes in bfloat16 otherwise
    sampler = "trainer.v1.sampler.custom_sampler"
    return {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "val.parquet",
        "data.train_batch_size": 16,
        "data.max_prompt_length": 8,
        "data.max_response_length": 6,
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.model.path": folder / "model",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.use_torch_compile": False,
        f"{actor}.fsdp_config.strategy": "fsdp2",
        f"{actor}.fsdp_config.dtype": "float32",
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"+{actor}.fsdp_config.mixed_precision": exact,
        f"{actor}.optim.lr": 0.01,
        f"{actor}.ppo_mini_batch_size": 8,
        f"{actor}.ppo_epochs": 2,
        f"{actor}.ppo_micro_batch_size_per_gpu": 8,
        f"{rollout}.name": "transformers_cpu",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.n": 4,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 16,
        f"{rollout}.dtype": "float32",
        f"{rollout}.agent.num_workers": 1,
        "reward.custom_reward_function.path": folder / "reward.py",
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        f"{sampler}.path": "pkg://bandpo.engines.verl_cpu",
        f"{sampler}.name": "quick_replay_buffer",
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": workers,
        "trainer.logger": "[console,file]",
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": steps,
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.resume_mode": "disable",
        "ray_kwargs.ray_init.num_cpus": 16,  # logical ones; verl asks for more than three a worker
        "+ray_kwargs.ray_init.num_gpus": workers,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.address": "local",  # not a cluster that somebody else has started here
        f"{actor}.policy_loss._target_": "bandpo.engines.verl.BandLossConfig",
        f"{actor}.policy_loss.loss_mode": "bandpo",
        f"+{actor}.policy_loss.clip": "band",
        f"+{actor}.policy_loss.clip_args": "{divergence:tv,delta:0.02}",
    }


class Run:
    """verl's trainer in a process group of its own.

    Args:
        folder: from `make_world`.
        name: of the log files.
        workers: training workers.
        steps: rollouts to train on.
        **settings: verl's settings to add or change, "__" for ".".
    """

    def __init__(self, folder: Path, name: str, workers: int, steps: int, settings: dict[str, Any]) -> None:
        self.log, self.file = folder / f"{name}.log", folder / f"{name}.jsonl"
        words = [f"{key}={value}" for key, value in (overrides(folder, workers, steps) | settings).items()]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= ENVIRONMENT | {"VERL_FILE_LOGGER_PATH": str(self.file)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "verl.trainer.main_ppo", *words], stdout=log, stderr=subprocess.STDOUT,
                env=environment, cwd=folder, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, as a lost machine would: driver, daemons and workers; afterwards none of them writes."""
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        assert not psutil.wait_procs(left, timeout=60)[1]

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether it has inherited this run's environment, in which the log's name stands for the run."""
        with contextlib.suppress(psutil.Error):
            return process.environ().get("VERL_FILE_LOGGER_PATH") == str(self.file)
        return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return "\n".join(self.text().splitlines()[-40:])

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the log has a match."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            match = re.search(pattern, self.text())
            if match:
                return match
            assert self.process.poll() is None, f"ended without {pattern!r}:\n{self.tail()}"
            time.sleep(0.5)
        raise AssertionError(f"no {pattern!r} within {PATIENCE:.0f} s:\n{self.tail()}")

    def finish(self) -> list[dict[str, float]]:
        """Wait for the end and return the metrics of each step."""
        assert self.process.wait(PATIENCE) == 0, self.tail()
        return self.metrics()

    def metrics(self) -> list[dict[str, float]]:
        whole = self.file.read_text().rpartition("\n")[0]  # a run that was killed may have been writing
        entries = [json.loads(line) for line in whole.splitlines()]
        return [{"step": entry["step"], **entry["data"]} for entry in entries if "actor/pg_loss" in entry["data"]]
