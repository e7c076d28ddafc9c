"""A whole TRL step that is measured against the same step that is not, taken in turn in one process.

The measured one is BandGRPOTrainer with clip="host": TRL's own loss, unchanged, and beside it what its clip does.
Both run their ordinary `train()`, one rollout with all its updates at a time. Target: <= 1.02. On a busy machine the
two differ by several percent whatever they do; so there is also the measured steps' time over the same less what the
measuring took in them, "in place". verl's step with its own loss measured is the arm "host" of bench_verl_step.py
(--arms host --name monitor_verl). Beside it, `Monitor.update` alone, by the token and by the update.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
import warnings
from typing import Any

import torch
import transformers
import trl
from bench_trl_step import PROMPTS, SIZES, Baton
from common import Spent, ratios, write
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_support import digits, make_tokenizer

import bandpo
from bandpo.engines import trl as engine
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.loss.stats import BRIEF

CLIPS = ("fixed", "band", "sapo")
ARMS: dict[str, tuple[type[GRPOTrainer], type[GRPOConfig], dict[str, Any]]] = {
    "trl": (GRPOTrainer, GRPOConfig, {}),
    "measured": (BandGRPOTrainer, BandGRPOConfig, {"clip": "host", "clip_metrics": "brief"}),
    "not counted": (BandGRPOTrainer, BandGRPOConfig, {"clip": "host", "clip_metrics": "none"}),
}


def make(arm: str, size: tuple[int, ...], rounds: int, baton: Baton) -> GRPOTrainer:
    kind, config, more = ARMS[arm]
    width, layers, batch, tokens, updates = size
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = Qwen2Config(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    args = config(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=1, learning_rate=1e-4, per_device_train_batch_size=batch, num_generations=8,
        steps_per_generation=updates, gradient_accumulation_steps=1, max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens}, max_steps=(rounds + 1) * updates, **more,
    )  # fmt: skip
    made = kind(
        Qwen2ForCausalLM(model), digits, args, train_dataset=PROMPTS, processing_class=tokenizer, callbacks=[baton]
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time `rounds` rollouts of each trainer, in an order that goes round from one to the next."""
    size = SIZES[name]
    sides = {arm: Baton(size[-1]) for arm in ARMS}
    for arm, baton in sides.items():
        threading.Thread(target=make(arm, size, rounds, baton).train, daemon=True).start()
        baton.finish()
    arms, taken, spent = list(ARMS), [], Spent()
    spent.on(engine, "clip_stats")
    spent.on(BandGRPOTrainer, "_take_metrics")
    for i in range(rounds):
        before = spent.seconds
        for arm in arms[i % len(arms) :] + arms[: i % len(arms)]:
            sides[arm].turn()
        taken.append(spent.seconds - before)
    warm = max(2, rounds // 10)
    times = {arm: baton.times[warm:] for arm, baton in sides.items()}
    row: dict[str, Any] = {"what": f"TRL rollout with its updates, {name}", "trl": trl.__version__}
    row |= {"transformers": transformers.__version__, "width": size[0], "layers": size[1], "tokens": size[3]}
    row |= {"completions": size[2] * size[4], "updates": size[4], "rounds": len(times["trl"])}
    for i, clock in enumerate(("processor", "wall")):
        own = [x[i] for x in times["trl"]]
        row[f"{clock}_trl_seconds"] = statistics.median(own)
        for arm in arms[1:]:
            found = ratios(own, [x[i] for x in times[arm]])
            row |= {f"{arm}: {clock}_ratio_{place}": value for place, value in found.items()}
    whole = [x[0] for x in times["measured"]]
    rest = [step - own for step, own in zip(whole, taken[warm:], strict=True)]
    return row | {f"measured: in_place_ratio_{place}": value for place, value in ratios(rest, whole).items()}


def alone(clip: str, rows: int = 64, columns: int = 1024, rounds: int = 10) -> dict[str, Any]:
    """`Monitor.update`, nanoseconds of processor time a token."""
    old = -3 * torch.rand(rows, columns)
    new, advantages, mask = old - 0.2 * torch.rand_like(old), torch.randn(rows), torch.ones_like(old)
    monitor, best = bandpo.Monitor(clip), float("inf")
    for _ in range(rounds):
        start = time.process_time()
        monitor.update(new, old, advantages, mask)
        best = min(best, time.process_time() - start)
    return {"what": f"Monitor.update, {clip}", "tokens": old.numel(), "nanoseconds_a_token": 1e9 * best / old.numel()}


def one_update(clip: str, rows: int = 32, columns: int = 6, rounds: int = 1000) -> dict[str, Any]:
    """What the measuring of one update of the tiny shape takes, its log included: the fastest, microseconds."""
    old = -3 * torch.rand(rows, columns)
    new, advantages, mask = old - 0.2 * torch.rand_like(old), torch.randn(rows), torch.ones_like(old)
    monitor, best = bandpo.Monitor(clip), {"update": float("inf"), "log": float("inf")}
    for _ in range(rounds):
        start = time.process_time()
        monitor.update(new, old, advantages, mask)
        middle = time.process_time()
        torch.stack(list(monitor.compute(only=BRIEF).values())).tolist()
        monitor.reset()
        best["update"] = min(best["update"], middle - start)
        best["log"] = min(best["log"], time.process_time() - middle)
    what = f"one update of {rows * columns} tokens and its log, {clip}"
    return {"what": what} | {f"{name}_microseconds": 1e6 * x for name, x in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--name", default="monitor", help="of the file in benchmarks/results")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    rows = [measure(name, args.rounds if name == "tiny" else args.rounds // 2) for name in args.sizes]
    write(args.name, rows + [alone(clip) for clip in CLIPS] + [one_update(clip) for clip in CLIPS])


if __name__ == "__main__":
    main()
