"""The TRL engine against an independent loss, against TRL itself, and with TRL's other features."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen2ForSequenceClassification
from trl import GRPOTrainer
from trl_support import SCHEDULE, digits, make_model, make_tokenizer, make_trainer, model_config, prompts

from bandpo import Band
from bandpo.engines.trl import BandGRPOTrainer

Tensor = torch.Tensor


def tv_bounds(p: Tensor) -> tuple[Tensor, Tensor]:
    return (1 - 0.02 / p).clamp(min=0), torch.minimum(1 + 0.02 / p, 1 / p)


def kl_bounds(p: Tensor) -> tuple[Tensor, Tensor]:
    """Bisection on KL(p, q) = 0.02 in float64, both sides."""
    edges = []
    for end in (torch.zeros_like(p), torch.ones_like(p)):
        inside, outside = p.clone(), end
        for _ in range(200):
            q = (inside + outside) / 2
            over = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log() > 0.02
            inside, outside = torch.where(over, inside, q), torch.where(over, q, outside)
        edges.append(inside / p)
    return edges[0], edges[1]


def own_logps(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    hidden = trainer.model.model(input_ids=ids, attention_mask=attention).last_hidden_state
    logits = hidden[:, inputs["prompt_ids"].size(1) - 1 : -1] @ trainer.model.lm_head.weight.T / trainer.temperature
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]


def own_loss(trainer: Any, inputs: dict[str, Any], bounds: Any) -> tuple[Tensor, Tensor]:
    """The loss from the papers' formulas, and which tokens it gives no gradient."""
    logps, old, mask = own_logps(trainer, inputs), inputs["old_per_token_logps"], inputs["completion_mask"]
    advantages, ratio = inputs["advantages"][:, None], (logps - old).exp()
    low, high = (b.float() for b in bounds(old.double().exp()))
    outward = torch.where(advantages > 0, ratio > high, (ratio < low) & (advantages < 0)) & mask.bool()
    kind, accumulate = trainer.args.loss_type, trainer.args.gradient_accumulation_steps
    inner = torch.maximum(torch.minimum(ratio, high), low)
    loss = -torch.minimum(ratio * advantages, inner * advantages) * mask
    if kind == "grpo":
        return (loss.sum(1) / mask.sum(1)).mean() / accumulate, outward
    if kind == "bnpo":
        return loss.sum() / mask.sum() / accumulate, outward
    if kind == "dr_grpo":
        return loss.sum() / (mask.size(0) * trainer.args.max_completion_length) / accumulate, outward
    if kind == "luspo":
        return loss.sum(1).mean() / accumulate, outward
    tokens = sum(int(batch["completion_mask"].sum()) for batch in trainer._buffered_inputs)
    return loss.sum() / tokens * trainer.args.steps_per_generation / accumulate, outward


class Checked(BandGRPOTrainer):
    """Compares every micro-batch's loss and gradient with `own_loss`."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        weights = list(self.model.parameters())
        want, outward = own_loss(self, inputs, self.own_bounds)
        want_grad = torch.cat([g.flatten() for g in torch.autograd.grad(want, weights)])
        loss = super()._compute_loss(model, inputs)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        error = (grad - want_grad).norm() / want_grad.norm().clamp(min=1e-8)
        self.errors.append((abs(float((loss - want).detach())), float(error)))
        self.seen += torch.tensor([outward.sum(), inputs["completion_mask"].sum()])
        return loss


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
SCHEDULES = [(1, 4, 1), (2, 1, 1), (1, 3, 2)]
CASES = [(loss, "tv", tuple(SCHEDULE.values())) for loss in LOSSES] + [("grpo", "kl", SCHEDULES[0])]
CASES += [("dapo", "tv", schedule) for schedule in SCHEDULES[1:]]


@pytest.mark.parametrize(("loss_type", "divergence", "schedule"), CASES)
def test_loss_and_gradient_equal_an_independent_one(tmp_path, loss_type, divergence, schedule):
    trainer = make_trainer(
        tmp_path, Checked, loss_type=loss_type, clip_args={"divergence": divergence, "delta": 0.02},
        **dict(zip(SCHEDULE, schedule, strict=True)),
    )  # fmt: skip
    trainer.own_bounds = {"tv": tv_bounds, "kl": kl_bounds}[divergence]
    trainer.errors, trainer.seen = [], torch.zeros(2)
    trainer.train()
    loss_error, gradient_error = (max(e) for e in zip(*trainer.errors, strict=True))
    assert loss_error < 5e-6 and gradient_error < 5e-6
    assert trainer.seen[0] / trainer.seen[1] > 0.03  # the clip did act
    logged = [entry["clip/zero_grad"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(logged) > 0.03


def test_fixed_clip_equals_trl_itself(tmp_path):
    args = {"eps_low": 0.2, "eps_high": 0.28}
    more: dict[str, Any] = {"delta": 1.5, "top_entropy_quantile": 0.8, "entropy_coef": 0.01}
    ours = make_trainer(tmp_path / "a", clip="fixed", clip_args=args, **more)
    ours.train()
    plain = make_trainer(tmp_path / "b", GRPOTrainer, epsilon=0.2, epsilon_high=0.28, **more)
    plain.train()
    for got, want in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for key in want.keys() - {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6), key
    assert max(entry.get("clip_ratio/region_mean", 0) for entry in plain.state.log_history) > 0.03


def test_metrics_are_shares_of_all_tokens_since_the_last_log(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, Checked, clip_args={"divergence": "tv", "delta": 0.02}, logging_steps=6)
    trainer.own_bounds, trainer.errors, trainer.seen = tv_bounds, [], torch.zeros(2)
    trainer.token_callback = lambda *tensors: seen.append(tensors)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["clip/zero_grad"] == pytest.approx(float(trainer.seen[0] / trainer.seen[1]), abs=1e-6)
    assert len(seen) == 12 and all(t.shape == seen[0][3].shape and not t.requires_grad for t in seen[0])
    assert sum(float(t[3].sum()) for t in seen) == trainer.seen[1]


@pytest.mark.filterwarnings("ignore:num_iterations=1")
@pytest.mark.parametrize(("clip", "clip_args"), [("band", {"delta": 0.001}), ("sapo", None), ("gspo", None)])
def test_one_update_a_rollout_is_left_alone(tmp_path, clip, clip_args):
    once = {"num_iterations": 1, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    band = make_trainer(tmp_path / "a", clip=clip, clip_args=clip_args, **once)
    band.train()
    none = make_trainer(tmp_path / "b", clip="none", **once)
    none.train()
    for one, other in zip(band.model.parameters(), none.model.parameters(), strict=True):
        assert torch.equal(one, other)
    first = band.state.log_history[0]
    assert first["clip/outside_above"] == first["clip/kl_mean"] == 0
    assert first["clip/gradient_kept"] == pytest.approx(1)


def test_lora_trains_the_adapter_alone(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"), max_steps=4)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("lora" in name for name in moved)
    assert trainer.state.log_history[0]["clip/kl_mean"] >= 0


def test_chat_reward_model_two_functions_and_evaluation(tmp_path):
    torch.manual_seed(1)
    judge = Qwen2ForSequenceClassification(model_config(num_labels=1))

    def shortness(completions: list, **_: Any) -> list[float]:
        return [-float(len(c[0]["content"])) for c in completions]

    trainer = make_trainer(
        tmp_path, train_dataset=prompts(chat=True), eval_dataset=prompts(chat=True),
        reward_funcs=[digits, shortness, judge], reward_processing_classes=[None, None, make_tokenizer()],
        reward_weights=[1.0, 0.1, 0.1], clip_metrics="full", eval_strategy="steps", eval_steps=2, max_steps=4,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(steps) == 4 and len(evals) == 2
    assert "rewards/shortness/mean" in steps[0] and all("clip/zero_grad_above/p0.1-0.5" in e for e in steps)
    assert all("eval_rewards/digits/mean" in e and not any("clip/" in k for k in e) for e in evals)


def test_resume_on_a_generation_boundary_changes_nothing(tmp_path):
    boundary = {"num_iterations": 1, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, **boundary}
    straight = make_trainer(tmp_path / "a", **options)
    straight.train()
    resumed = make_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    last = [[e for e in t.state.log_history if e["step"] == 8 and "loss" in e][0] for t in (straight, resumed)]
    assert last[0]["clip/kl_mean"] == last[1]["clip/kl_mean"] > 0


def test_model_card_names_what_was_used(tmp_path):
    make_trainer(tmp_path / "band").create_model_card("x")
    make_trainer(tmp_path / "fixed", clip="fixed").create_model_card("x")
    band, fixed = ((tmp_path / name / "README.md").read_text() for name in ("band", "fixed"))
    assert all(part in band for part in ("with BandPO", "papers/2603.04918", "li2026bandpo", "- bandpo"))
    assert "bandpo" not in fixed.lower() and "with GRPO" in fixed


def test_ten_lines_of_the_guide_train(tmp_path):
    """As they stand, but for the folder, the model, and what the page says to add for a small one on the CPU."""
    page = (Path(__file__).parents[1] / "docs" / "trl.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for old, new in (
        ('"runs/first"', f"{str(tmp_path / 'run')!r}, use_cpu=True, bf16=False, gradient_checkpointing=False"),
        ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tmp_path / "model"))),
    ):
        assert block.count(old) == 1
        block = block.replace(old, new)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "docs/trl.md", "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer, BandGRPOTrainer) and trainer.state.global_step == 20
    assert trainer.clip == Band(delta=0.05) and "clip/zero_grad" in trainer.state.log_history[0]


def test_two_processes_agree(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    script = str(Path(__file__).with_name("trl_support.py"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"] and one["counts"] != two["counts"]
    assert one["logs"] == two["logs"]
    logs = [entry for entry in one["logs"] if entry]
    above, tokens = (a + b for a, b in zip(one["counts"], two["counts"], strict=True))
    assert len(logs) == 2 and above > 0
    assert sum(entry["clip/zero_grad_above"] for entry in logs) / 2 == pytest.approx(above / tokens, rel=0.2)
