"""The cache folder of models that are made here: each once, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from bandpo._input import InputError
from bandpo.lab.models import cache_folder, cache_name


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """Make a model where the cache has it not yet.

    Args:
        name: the model's.
        make: writes model and tokenizer into the folder that it is given.

    Returns:
        The folder with the model.

    Raises:
        InputError: the cache folder cannot be written.
    """
    target = cache_folder() / cache_name(name)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"), _written_whole(target) as folder:
            if not target.is_dir():  # another process may have made it while this one waited
                make(folder)
    except OSError as error:
        raise InputError(
            f"model={name!r}: cannot write it to {target.parent} ({error.strerror or error}); "
            "make room there, or set BANDPO_CACHE to another folder"
        ) from error
    return target


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one step when the block ends without an error."""
    outer = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))  # for its owner's eyes alone
    folder = outer / target.name  # which others may read, where the cache is theirs too
    try:
        folder.mkdir()
        yield folder
        if not target.is_dir():
            folder.rename(target)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
