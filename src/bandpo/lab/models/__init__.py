"""Models by name: the tiny one that ships with the package, those that are made here, a folder, or a Hub name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

TINY = "bandpo/tiny-addition"
SMOLLM2 = "smollm2-135m-instruct"
UNTRAINED = {"bandpo/random-qwen2": "qwen2", "bandpo/random-llama": "llama"}
"""Tiny models of random weights, and their architectures."""
NAMES = (TINY, SMOLLM2, *UNTRAINED)
ASSETS = Path(__file__).parent / "assets"


def cache_folder() -> Path:
    """Return where converted models are kept: $BANDPO_CACHE, else ~/.cache/bandpo; it need not exist yet."""
    return Path(os.environ.get("BANDPO_CACHE") or Path.home() / ".cache" / "bandpo").expanduser()


def cache_name(name: str) -> str:
    """Return the name of a model's folder in the cache."""
    return name.removeprefix("bandpo/")


def source_of(name: str, *, make: bool = True, progress: Progress | None = None) -> str:
    """Return what transformers loads a model from.

    Args:
        name: one of `NAMES`, a local folder, or a name on the Hugging Face Hub.
        make: whether to make what is not there yet (SmolLM2 out of its package, a random model).
        progress: told how far a conversion is; None for silence.

    Returns:
        An absolute folder, or the name itself for the Hub.

    Raises:
        InputError: a package that the model needs is missing, or the cache folder cannot be written.
    """
    if name == TINY:
        return str(ASSETS / "tiny-addition")
    if name == SMOLLM2 and make:
        from bandpo.lab.models.smollm2 import prepare_smollm2

        return str(prepare_smollm2(progress=progress))
    if name in UNTRAINED and make:
        from bandpo.lab.models.untrained import prepare_untrained

        return str(prepare_untrained(name))
    if name == SMOLLM2 or name in UNTRAINED:
        return str(cache_folder() / cache_name(name))
    return str(Path(name).absolute()) if os.path.isdir(name) else name
