"""The tiny model: its architecture and its tokenizer, a token a character; one for addition ships with bandpo."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CHARACTERS = "0123456789+="


def tiny_model(characters: str = CHARACTERS) -> GPT2LMHeadModel:
    """Return the architecture with random weights: GPT-2's, 64 wide, 2 layers, 4 heads, no dropout; 103,104 of them."""
    tokenizer = character_tokenizer(characters)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # the fused form of GPT-2's own
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer of some characters and the usual special tokens that adds nothing of its own to a text."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
