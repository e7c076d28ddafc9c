"""Five logs of tokens of different origin, for `bandpo explain`: each shows one thing, in one format.

    python examples/make_logs.py examples/logs      # what the environment has the trainer for: TRL and verl need two
    python examples/make_logs.py src/bandpo/examples --only tokens.npz      # the one that ships with the package

trl.pt        what TRL hands to its loss, dumped by a subclass of its GRPOTrainer: the model that ships with bandpo,
              addition, TRL's own clip (0.2 / 0.2), the last of four rollouts of 16 updates each
tokens.npz    all four of them, as tokens one after the other, with the sequences' lengths
verl.pt       what verl's actor hands to its loss, under verl's names: the recipe verl-demo with PPO's clip, the last
              two of four rollouts of 8 updates each, two workers
idle.jsonl    a line a sequence; one update a rollout, so that every ratio is 1
gap.parquet   a row a sequence; an engine that samples with other logits than the trainer computes
collapse.npz  padded arrays with entropies and logits; a policy that is nearly certain of everything

The last three come from a policy in a table: logits z[state, token] = scale x standard normal. A group of sequences
visits the same random states; its tokens are drawn from softmax(z + gap x standard normal); the reward is the share of
even tokens; A is the reward, normalised within the group. Then come `updates` steps of PPO's clipped objective (0.2 /
0.2) on a quarter of the sequences each, with plain gradient descent; logged is what the last step saw.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bandpo

STATES, WORDS, GROUPS, GROUP, TOKENS = 24, 16, 32, 8, 24


def simulate(
    seed: int, scale: float, updates: int, rate: float, gap: float = 0.0, logits: bool = False, groups: int = GROUPS
) -> dict[str, Tensor]:
    """Return what a table of logits logs; see above."""
    random = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(STATES, WORDS, generator=random)
    engine = z + gap * torch.randn(STATES, WORDS, generator=random)
    states = torch.randint(STATES, (groups, 1, TOKENS), generator=random).expand(-1, GROUP, -1).reshape(-1, TOKENS)
    chances = torch.softmax(engine, -1)[states].flatten(0, 1)
    words = torch.multinomial(chances, 1, generator=random).view(states.shape)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (len(states), 1), generator=random)
    mask = torch.arange(TOKENS) < lengths
    reward = ((words % 2 == 0) & mask).sum(-1) / lengths[:, 0]
    group = reward.view(groups, GROUP)
    advantages = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)).flatten()

    def logps(table: Tensor) -> Tensor:
        return torch.log_softmax(table, -1)[states, words]

    old, new = logps(z), z.clone().requires_grad_()
    for i in range(updates - 1):
        part = slice(i % 4, None, 4)
        ratio, adv = torch.exp(logps(new) - old)[part], advantages[part, None]
        gain = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
        (step,) = torch.autograd.grad((gain * mask[part]).sum() / mask[part].sum(), new)
        new = (new + rate * step).detach().requires_grad_()
    new = new.detach()
    log_pi = torch.log_softmax(new, -1)
    found = {
        "logps": logps(new),
        "old_logps": old,
        "advantages": advantages,
        "mask": mask,
        "rollout_logps": logps(engine),
    }
    found["entropies"] = -(log_pi.exp() * log_pi).sum(-1)[states]
    return found | ({"logits": new[states]} if logits else {})


def rows(tokens: dict[str, Tensor], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a record for each sequence, without padding."""
    records = []
    for i, kept in enumerate(tokens["mask"]):
        values = {name: tokens[name][i][kept] if tokens[name].dim() > 1 else tokens[name][i] for name in names}
        records.append({name: [round(y, 6) for y in x.tolist()] if x.dim() else x.item() for name, x in values.items()})
    return records


# --8<-- [start:verl]
@dataclass(frozen=True)
class Recording(bandpo.Clip):
    """PPO's clip, and a file for each micro-batch that it is shown."""

    folder: str = "tokens"

    def coefficient(self, tokens: bandpo.Tokens) -> Tensor:
        batch = {"log_probs": tokens.log_q, "old_log_probs": tokens.log_p, "advantages": tokens.advantages}
        place = len(list(Path(self.folder).glob(f"{os.getpid()}-*")))
        torch.save(batch | {"response_mask": tokens.mask}, f"{self.folder}/{os.getpid()}-{place:06}.pt")
        return bandpo.get_clip("fixed").coefficient(tokens)


# --8<-- [end:verl]


def verl(out: Path) -> None:
    """A real run of verl; needs the environment that has it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("bandpo"), "verl", "verl-demo", "--out", f"{folder}/run"]
        options = {"clip": f"{Path(__file__).resolve()}:Recording", "clip_args.folder": folder, "clip_metrics": "none"}
        options |= {"max_steps": 32, "eval_prompts": 16, "eval_samples": 1, "eval_every": 0, "save_steps": 32}
        subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())], check=True)
        workers = defaultdict(list)
        for path in sorted(Path(folder).glob("*-*.pt")):
            workers[path.name.split("-")[0]].append(torch.load(path, weights_only=True))
    batches = [batch for recorded in workers.values() for batch in recorded[-16:]]
    torch.save({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, out)


def idle(out: Path) -> None:
    records = rows(simulate(seed=2, scale=2.0, updates=1, rate=1.0, groups=12), ("logps", "old_logps", "advantages"))
    out.write_text("".join(json.dumps(record) + "\n" for record in records))


def gap(out: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    tokens = simulate(seed=3, scale=2.0, updates=4, rate=40.0, gap=0.6)
    names = ("logps", "old_logps", "rollout_logps", "advantages")
    records = rows(tokens, names)
    lists, number = pyarrow.list_(pyarrow.float32()), pyarrow.float32()
    schema = pyarrow.schema([(name, number if name == "advantages" else lists) for name in names])
    parquet.write_table(pyarrow.Table.from_pylist(records, schema), out)


def collapse(out: Path) -> None:
    tokens = simulate(seed=4, scale=24.0, updates=3, rate=20.0, logits=True)
    del tokens["rollout_logps"]
    np.savez_compressed(out, **{name: x.numpy() for name, x in tokens.items()})  # type: ignore[arg-type]


@functools.cache
def run_trl() -> list[dict[str, Tensor]]:
    """A real run of TRL's own trainer; what its loss gets is kept, with the log-probabilities that the loss makes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    # --8<-- [start:trl]
    kept = ("completion_mask", "old_per_token_logps", "advantages", "sampling_per_token_logps", "tool_mask")
    batches: deque[dict[str, Tensor]] = deque(maxlen=64)  # the last ones, off the device

    class Dumping(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> Any:
            self.made = super()._get_per_token_logps_and_entropies(*args, **named)
            return self.made

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            loss = super()._compute_loss(model, inputs)
            if model.training:  # an evaluation comes here too
                batch = {name: inputs[name] for name in kept if inputs.get(name) is not None}
                batch |= {"logps": self.made[0], "entropies": self.made[1]}
                batches.append({name: x.detach().to("cpu", copy=True) for name, x in batch.items()})
            return loss

    # --8<-- [end:trl]

    def right(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        sums = [sum(map(int, prompt.rstrip("=").split("+"))) for prompt in prompts]
        return [float(text[:4] == f"{answer:04d}") for text, answer in zip(completions, sums, strict=True)]

    random = np.random.default_rng(0)
    problems = [f"{a}+{b}=" for a, b in random.integers(100, 1000, (512, 2))]
    folder = next(Path(bandpo.__file__).parent.rglob("tiny-addition"))
    with tempfile.TemporaryDirectory() as runs:
        args = GRPOConfig(
            runs, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_steps=64, seed=0, max_steps=64, learning_rate=1.5e-4,
            lr_scheduler_type="constant", num_generations=16, per_device_train_batch_size=32, steps_per_generation=16,
            gradient_accumulation_steps=1, max_completion_length=5,
        )  # fmt: skip
        trainer = Dumping(
            AutoModelForCausalLM.from_pretrained(folder), right, args,
            train_dataset=Dataset.from_dict({"prompt": problems}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        trainer.train()
    return list(batches)


def trl(out: Path) -> None:
    torch.save(run_trl()[-16:], out)


def flat(out: Path) -> None:
    batches = run_trl()
    names = {"logps": "logps", "old_logps": "old_per_token_logps", "entropies": "entropies"}
    masks = [batch["completion_mask"].bool() for batch in batches]
    arrays = {
        ours: torch.cat([batch[theirs][mask] for batch, mask in zip(batches, masks, strict=True)])
        for ours, theirs in names.items()
    }
    arrays["advantages"] = torch.cat([batch["advantages"] for batch in batches])
    arrays["lengths"] = torch.cat([mask.sum(-1) for mask in masks]).to(torch.int32)
    np.savez_compressed(out, **{name: x.numpy() for name, x in arrays.items()})  # type: ignore[arg-type]


LOGS = {"trl.pt": trl, "verl.pt": verl, "idle.jsonl": idle, "gap.parquet": gap, "collapse.npz": collapse}
ALL = LOGS | {"tokens.npz": flat}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--only", nargs="+", choices=ALL, default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or LOGS:
        trainer = {"trl.pt": "trl", "tokens.npz": "trl", "verl.pt": "verl"}.get(name)
        if trainer and importlib.util.find_spec(trainer) is None:
            print(f"{name} is left out: {trainer} is not installed here")
            continue
        ALL[name](args.out / name)
        print(args.out / name)


if __name__ == "__main__":
    main()
