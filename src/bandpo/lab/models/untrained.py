"""Tiny models of random weights with the architecture of a large one: what `--smoke` trains in its place."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bandpo.lab.models import UNTRAINED
from bandpo.lab.models.cache import make_once
from bandpo.lab.models.quiet import without_noise

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Digits in a box are tokens of their own, so that random text holds a right answer now and then.
BOXED = [f"\\boxed{{{digit}}}" for digit in range(10)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare_untrained(name: str) -> Path:
    """Make a tiny model of random weights, once; a tenth of a second, 150 kB of disk, no network.

    Args:
        name: one of `UNTRAINED`.

    Returns:
        The folder with model and tokenizer.

    Raises:
        InputError: the cache folder cannot be written.
    """

    def make(folder: Path) -> None:
        with without_noise():
            untrained_model(UNTRAINED[name]).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    return make_once(name, make)


def byte_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer with a token for each byte, one for each digit in a box, and chat messages."""
    # transformers reads every tokenizer beside a Qwen2 model as a Qwen2Tokenizer; a Llama takes one as well.
    words = [*bytes_to_unicode().values(), *SPECIAL]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token=SPECIAL[0],
        eos_token="<|im_end|>", pad_token=SPECIAL[0],
    )  # fmt: skip
    tokenizer.add_tokens(BOXED)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def untrained_model(architecture: str) -> PreTrainedModel:
    """Return a model of random weights, always the same: 32 wide, 2 layers, 4 heads, 2 of keys and values.

    Args:
        architecture: transformers' name of it, such as "qwen2" or "llama".

    Returns:
        The model, float32.
    """
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
