"""Real runs of an unmodified verl with the engine: two workers, critic, reference model, checkpoints, lost workers."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from verl_support import PATIENCE, Run, make_world

from bandpo.lab.verl.failure import explain

IN_USE = r"\(WorkerDict pid=(\d+)\).{0,10} bandpo: policy loss 'bandpo' in use in this worker: (.*), dual_clip=None"
ACTOR = "actor_rollout_ref.actor"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_world(tmp_path)
    return tmp_path


def share(entry: dict[str, float], name: str) -> float:
    return entry[f"actor/clip/{name}_sum"] / entry["actor/clip/tokens_sum"]


def check_clip(entries: list[dict[str, float]], workers: int, micro_batches: int, passes: int) -> None:
    """Every token of every worker is counted, `passes` times a rollout, and the clip takes gradients."""
    for entry in entries:
        tokens = entry["actor/clip/tokens_sum"] * workers * micro_batches
        responses = entry["response_length/mean"] * 64  # 16 prompts, 4 rollouts each
        assert tokens == pytest.approx(passes * responses, rel=1e-6)
    lost = [share(e, "zero_grad_above") + share(e, "zero_grad_below") for e in entries]
    assert max(lost) > 0.01
    for entry, ours in zip(entries, lost, strict=True):
        # verl counts the dual clip apart, and weighs micro-batches alike though their tokens differ: off by up to 0.03
        theirs = entry["actor/pg_clipfrac"] + entry.get("actor/pg_clipfrac_lower", 0.0)
        assert theirs == pytest.approx(ours, abs=0.1)


def test_two_workers_survive_a_lost_worker_and_a_kill(world):
    checkpoints = {"trainer.save_freq": 2, "trainer.resume_mode": "auto", f"{ACTOR}.optim.lr": 0.005}
    written = world / "checkpoints" / "latest_checkpointed_iteration.txt"
    with Run(world, "lost", 2, 30, checkpoints) as run:
        run.wait_for(r"step:3 -")
        found = re.findall(IN_USE, run.text())
        workers = {int(pid) for pid, _ in found}
        assert len(workers) == len(found) == 2 and found[0][1] == "Band(divergence='tv', delta=0.02, cap=None)"
        os.kill(workers.pop(), signal.SIGKILL)
        assert run.process.wait(PATIENCE) != 0  # the run stops by itself; on an idle machine within seconds
        assert re.search(r"ActorDiedError|The actor died unexpectedly", run.text()), run.tail()
        assert explain(run.text()).startswith("a worker was lost"), explain(run.text())
    check_clip(run.metrics(), workers=2, micro_batches=8, passes=2)
    kept = int(written.read_text())
    assert kept >= 2 and len(list((world / "checkpoints").glob(f"global_step_{kept}/actor/optim_*.pt"))) == 2

    with Run(world, "killed", 2, 30, checkpoints) as run:
        run.wait_for(rf"Resuming from .*global_step_{kept}\b")
        run.wait_for(rf"step:{kept + 3} -")
        run.kill()
    assert run.metrics()[0]["step"] == kept + 1

    latest = int(written.read_text())
    assert latest >= kept + 2
    with Run(world, "resumed", 2, latest + 2, checkpoints) as run:
        entries = run.finish()
        assert re.search(rf"Resuming from .*global_step_{latest}\b", run.text())
    assert [entry["step"] for entry in entries] == [latest + 1, latest + 2]
    check_clip(entries, workers=2, micro_batches=8, passes=2)


def test_critic_reference_entropy_and_off_policy_weights(world):
    exact = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    settings = {
        "algorithm.adv_estimator": "gae",
        "critic.model.path": world / "model",
        "critic.model.use_remove_padding": False,
        "critic.model.enable_gradient_checkpointing": False,
        "critic.strategy": "fsdp2",
        "critic.fsdp.strategy": "fsdp2",
        "critic.fsdp.dtype": "float32",
        "critic.fsdp.use_torch_compile": False,
        "+critic.fsdp.mixed_precision": exact,
        "critic.ppo_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.ref.strategy": "fsdp2",
        "actor_rollout_ref.ref.fsdp_config.strategy": "fsdp2",
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision": exact,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 16,
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.kl_loss_coef": 0.01,
        f"{ACTOR}.entropy_coeff": 0.001,
        f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum",
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "algorithm.rollout_correction.rollout_is": "token",
        f"+{ACTOR}.policy_loss.dual_clip": 10,
    }
    with Run(world, "critic", 2, 3, settings) as run:
        entries = run.finish()
        assert len(re.findall(r"'bandpo' in use in this worker: Band\(.*\), dual_clip=10", run.text())) == 2
    check_clip(entries, workers=2, micro_batches=8, passes=2)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert entry["critic/vf_loss"] > 0 and entry["actor/entropy_loss"] > 0 and entry["actor/kl_loss"] > 0
        assert entry["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-3)


OLDER = {"trainer.use_v1": False, "algorithm.rollout_correction.bypass_mode": True}


@pytest.mark.parametrize("settings", [{}, OLDER], ids=["default-trainer", "older-trainer-in-bypass-mode"])
def test_learns(world, settings):
    """The reward is the share of digits; of the 25 characters 10 are digits."""
    settings = {"actor_rollout_ref.rollout.calculate_log_probs": True, **settings}
    with Run(world, "learns", 1, 12, settings) as run:
        entries = run.finish()
        assert len(re.findall(IN_USE, run.text())) == 1
    check_clip(entries, workers=1, micro_batches=16, passes=2)
    scores = [entry["critic/score/mean"] for entry in entries]
    assert len(scores) == 12 and sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.2


MINE = """
import torch
from bandpo import Band, Region

class Soft:
    def __init__(self, region: Region = Band()):
        self.region = region

    def __repr__(self):
        return f"Soft({self.region})"

    def coefficient(self, tokens):
        outward = self.region.side(tokens) * tokens.advantages > 0
        return torch.where(outward, 0.0, tokens.weighted * torch.exp(-tokens.log_r.abs()))
"""
FREE = {
    "dppo_kl": ("dppo_kl", "{delta:0.01}", "full", r"DppoKL\(delta=0.01, cap=20.0\)"),
    "mine": (
        "mine.py:Soft", "{region:{clip:band,divergence:tv,delta:0.02}}", "brief",
        r"Soft\(Band\(divergence='tv', delta=0.02, cap=None\)\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_clips_that_no_clamp_can_express_train(world, name):
    clip, clip_args, how_much, shown = FREE[name]
    (world / "mine.py").write_text(MINE)
    given = {"clip": f'"{world / clip}"' if ":" in clip else clip, "clip_args": clip_args, "clip_metrics": how_much}
    with Run(world, name, 1, 2, {f"+{ACTOR}.policy_loss.{key}": value for key, value in given.items()}) as run:
        entries = run.finish()
        assert re.search(rf"'bandpo' in use in this worker: {shown}, dual_clip=None", run.text()), run.tail()
    check_clip(entries, workers=1, micro_batches=16, passes=2)
    for entry in entries:
        assert len([key for key in entry if key.startswith("actor/clip/")]) == {"full": 216, "brief": 9}[how_much]
        assert entry["actor/grad_norm"] > 0 and "actor/pg_clipfrac_lower" not in entry
        assert 0 < share(entry, "gradient_kept") / share(entry, "gradient_free") < 1


def test_a_misspelt_argument_ends_the_command_before_ray_starts(world):
    with Run(world, "misspelt", 1, 1, {f"+{ACTOR}.policy_loss.clip_args": "{delt:0.1}"}) as run:
        assert run.process.wait(PATIENCE) == 1
        assert "has no argument 'delt' (did you mean 'delta'?)" in run.text().replace("\\'", "'")
        assert "Started a local Ray instance" not in run.text()
