"""A tiny model, tokenizer and task for the TRL tests, built in code; as a script, one rank of the two-process test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer

torch.set_num_threads(1)  # for tensors this small more threads only cost time
CHARS = "0123456789+=abcdefgh "
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def model_config(**fields: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(CHARS) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, **fields,
    )  # fmt: skip


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(model_config(initializer_range=0.2))


def digits(completions: list, **_: Any) -> list[float]:
    """Share of digits, so that a group has rewards of both signs."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(x.isdigit() for x in text) / max(len(text), 1) for text in texts]


def prompts(chat: bool = False) -> Dataset:
    texts = [f"{a}+{b}=" for a in range(4) for b in (2, 35)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts] if chat else texts})


# Two iterations over a rollout of four micro-batches, two of them to an optimizer step: four updates a rollout.
SCHEDULE: dict[str, Any] = {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


def make_trainer(out: Path, trainer: type[GRPOTrainer] = BandGRPOTrainer, **options: Any) -> Any:
    """A trainer on the tiny task; `options` are config fields or trainer arguments."""
    arguments = {"reward_funcs": digits, "train_dataset": prompts(), "processing_class": make_tokenizer()}
    arguments |= {k: options.pop(k) for k in list(options) if not hasattr(BandGRPOConfig, k) and k not in FIELDS}
    model = arguments.pop("model", None) or make_model()
    config = BandGRPOConfig if issubclass(trainer, BandGRPOTrainer) else GRPOConfig
    base: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.01, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 6, **SCHEDULE,
    }  # fmt: skip
    return trainer(model=model, args=config(str(out), **(base | options)), **arguments)


FIELDS = set(BandGRPOConfig.__dataclass_fields__)


class Counting(BandGRPOTrainer):
    """Counts, with plain boolean operations, the tokens that leave the fixed clip outward."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        ratio = (self._logps - inputs["old_per_token_logps"]).exp()
        mask, up = inputs["completion_mask"].bool(), inputs["advantages"][:, None] > 0
        self.counts += torch.tensor([((ratio > 1.28) & up & mask).sum(), mask.sum()])
        return loss


def main(out: str) -> None:
    """Train on this rank and write what it logged and what it counted."""
    trainer = make_trainer(
        Path(out), Counting, clip="fixed", clip_args={"eps_low": 0.2, "eps_high": 0.28}, logging_steps=4, max_steps=8
    )
    trainer.counts = torch.zeros(2)
    trainer.train()
    weights = sum(float(p.double().sum()) for p in trainer.model.parameters())
    logs = [{k: v for k, v in entry.items() if k.startswith("clip/")} for entry in trainer.state.log_history]
    rank = trainer.accelerator.process_index
    record = {"logs": logs, "counts": trainer.counts.tolist(), "weights": weights}
    Path(out, f"rank{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1])
