"""A whole TRL step with the band against the same step with TRL's own clip, taken in turn in one process.

Two trainers run their ordinary `train()` in two threads of which only one is ever let go: one rollout with all its
updates, then the other's. Generation, scoring, loss, backward, optimizer and log are all in the time. Target: <= 1.02.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from common import ratios, write
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from trl_support import digits, make_tokenizer  # noqa: E402

# name: width, layers, completions in a micro-batch, tokens in a completion, micro-batches (= updates) in a rollout
SIZES = {"tiny": (64, 2, 32, 6, 16), "small": (256, 4, 16, 48, 4), "medium": (512, 6, 8, 64, 4)}
PROMPTS = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(10, 18) for b in range(10, 18)]})


def clocks() -> tuple[float, float]:
    """Processor time, which other jobs on the machine hardly touch, and wall time, which also sees a GPU."""
    return time.process_time(), time.perf_counter()


class Baton(TrainerCallback):
    """Lets a trainer run for one rollout at a time and notes how long each took."""

    def __init__(self, updates: int) -> None:
        self.updates, self.times = updates, []
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def turn(self) -> None:
        self.go.release()
        self.finish()

    def finish(self) -> None:
        if not self.done.acquire(timeout=120):
            raise TimeoutError("a trainer did not hand over; its thread's error is above")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done.release()
        self._wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step and state.global_step % self.updates == 0:
            self.times.append([now - then for now, then in zip(clocks(), self.start, strict=True)])
            self.done.release()
            self._wait()

    def _wait(self) -> None:
        self.go.acquire()
        self.start = clocks()


def make(
    kind: type[GRPOTrainer], size: tuple[int, ...], rounds: int, out: str, baton: Baton, device: str, bf16: bool
) -> GRPOTrainer:
    width, layers, batch, tokens, updates = size
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = BandGRPOConfig if kind is BandGRPOTrainer else GRPOConfig
    args = config(
        out, use_cpu=device == "cpu", bf16=bf16, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=1, learning_rate=1e-4, per_device_train_batch_size=batch, num_generations=8,
        steps_per_generation=updates, gradient_accumulation_steps=1, max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens}, max_steps=(rounds + 1) * updates,
    )  # fmt: skip
    return kind(
        Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **ids)), digits, args, train_dataset=PROMPTS,
        processing_class=tokenizer, callbacks=[baton],
    )  # fmt: skip


def measure(name: str, rounds: int, device: str, bf16: bool) -> dict[str, Any]:
    """Time `rounds` rollouts of each trainer, who goes first changing from round to round."""
    size, sides, trainers = SIZES[name], {}, {}
    for key, kind in (("trl", GRPOTrainer), ("band", BandGRPOTrainer)):
        sides[key] = Baton(size[-1])
        trainers[key] = make(kind, size, rounds, tempfile.mkdtemp(), sides[key], device, bf16)
        trainers[key].remove_callback(transformers.PrinterCallback)
    for key, trainer in trainers.items():
        threading.Thread(target=trainer.train, daemon=True).start()
        sides[key].finish()
    for i in range(rounds):
        for key in ("trl", "band") if i % 2 else ("band", "trl"):
            sides[key].turn()
    warm = max(2, rounds // 10)
    own, band = (sides[key].times[warm:] for key in ("trl", "band"))
    row: dict[str, Any] = {"what": f"TRL rollout with its updates, {name}", "device": device, "bf16": bf16}
    row |= {"trl": trl.__version__, "transformers": transformers.__version__, "width": size[0], "layers": size[1]}
    row |= {"completions": size[2] * size[4], "tokens": size[3], "updates": size[4], "rounds": len(own)}
    for i, clock in enumerate(("processor", "wall")):
        seconds = [x[i] for x in own]
        row[f"{clock}_trl_seconds"] = statistics.median(seconds)
        row |= {f"{clock}_ratio_{name}": value for name, value in ratios(seconds, [x[i] for x in band]).items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    write(
        "trl_step" if args.device == "cpu" else f"trl_step-{args.device}",
        [measure(n, args.rounds if n == "tiny" else args.rounds // 2, args.device, args.bf16) for n in args.sizes],
    )


if __name__ == "__main__":
    main()
