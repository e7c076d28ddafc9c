"""What the band sees of the movement of whole distributions: the embedded model in training, audited by rollout.

python benchmarks/audit.py [--delta 0.05] [--rollouts 12] [--seeds 5] [--lr 1.5e-4]

Each rollout is 32 problems x 16 answers and feeds 16 optimiser steps, as in the demo recipe. After the last of them the
audit compares, at every token, the policy with the one that wrote the rollout.
"""

from __future__ import annotations

import argparse

import torch
from common import write
from torch import Tensor
from transformers import logging

import bandpo
from bandpo.lab.models.load import load_model
from bandpo.lab.tasks import get_task

PROMPTS, SAMPLES, STEPS, LENGTH = 32, 16, 16, 5


def train(
    clip: bandpo.Region, delta: float, rollouts: int, lr: float, seed: int
) -> tuple[bandpo.Audit, float, list[float]]:
    """Return the sum of the audits, the radius that would leave 1 % outside in the last rollout, and the accuracies."""
    torch.manual_seed(seed)
    model, tokenizer = load_model("bandpo/tiny-addition")
    task = get_task("addition")
    data = task.train_dataset(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    total, right, matched = None, [], 0.0
    for i in range(rollouts):
        rows = data[i * PROMPTS : (i + 1) * PROMPTS]
        prompts = tokenizer(rows["prompt"], return_tensors="pt").input_ids.repeat_interleave(SAMPLES, 0)
        with torch.no_grad():
            text = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=LENGTH
            )
        actions = text[:, prompts.shape[1] :]
        ended = (actions == tokenizer.eos_token_id).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (actions == tokenizer.eos_token_id))
        answers = [a for a in rows["answer"] for _ in range(SAMPLES)]
        reward = torch.tensor(task.reward(tokenizer.batch_decode(actions, skip_special_tokens=True), answers))
        right.append(float((reward > 0).float().mean()))
        groups = reward.view(PROMPTS, SAMPLES)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

        def logits(rows: Tensor, text: Tensor = text, start: int = prompts.shape[1]) -> Tensor:
            return model(text[rows]).logits[:, start - 1 : -1]

        everything = torch.arange(len(text))
        with torch.no_grad():
            old = logits(everything)
        old_logps = old.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        for rows_of_step in torch.randperm(len(text)).chunk(STEPS):
            new = logits(rows_of_step).log_softmax(-1).gather(-1, actions[rows_of_step, :, None])[..., 0]
            where = rows_of_step
            out = bandpo.policy_loss(new, old_logps[where], advantages[where], mask[where], clip=clip, metrics=False)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            new = logits(everything)
        seen = bandpo.audit(new, old, actions, mask, delta=delta)
        total = seen if total is None else total + seen
        new_logps = new.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        matched = bandpo.match_delta(0.01, old_logps, new_logps, mask)
    assert total is not None
    return total, matched, right


def rows(name: str, audits: list[bandpo.Audit]) -> list[dict[str, object]]:
    """Return one row a bucket over all seeds; overall also the least and the greatest share missed of any seed."""
    total = audits[0]
    for seen in audits[1:]:
        total = total + seen
    metrics = {key: float(value) for key, value in total.metrics().items()}
    missed = [float(seen.metrics()["missed"]) for seen in audits]
    table: list[dict[str, object]] = []
    for place in ("", *(f"/{bucket}" for bucket in bandpo.diagnostics.BUCKETS)):
        names = ("tokens", "outside", "beyond", "missed", "binary_mean", "whole_mean", "ratio")
        table.append({"what": f"{name} {place[1:] or 'all'}", **{x: metrics[x + place] for x in names}})
    table[0] |= {"missed_least": min(missed), "missed_most": max(missed)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1.5e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    table: list[dict[str, object]] = []
    for name, clip in {"kl": bandpo.Band(delta=args.delta), "none": bandpo.NoClip()}.items():
        runs = [train(clip, args.delta, args.rollouts, args.lr, seed) for seed in range(args.seeds)]
        table += rows(name, [seen for seen, _, _ in runs])
        table += [
            {"what": f"{name} seed {i}", "delta_for_1_percent": matched, "accuracy": right}
            for i, (_, matched, right) in enumerate(runs)
        ]
    write("audit", table)


if __name__ == "__main__":
    main()
