"""A run of several processes that loses one: the others say so in a line, and end."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed

from bandpo.lab.run.session import Stopped

_WHERE = re.compile(r"^\[[^\]]*\] ")  # the file and line of gloo's that an error begins with


@contextmanager
def peers_watched() -> Iterator[None]:
    """End the block with `Stopped` where another process of the run is lost, or torchrun ends this one for that."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    before = signal.signal(signal.SIGTERM, _told_to_stop)
    try:
        yield
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself, once it has said why
        if _is_lost(error):
            what = _WHERE.sub("", " ".join(str(error).split())).split(". ")[0][:200]
            raise Stopped(f"another process of the run was lost ({what})") from error
        raise
    signal.signal(signal.SIGTERM, before)


def _told_to_stop(number: int, frame: Any) -> None:
    raise Stopped("stopped by SIGTERM, which torchrun sends when another process of the run is lost")


def _is_lost(error: Exception) -> bool:
    """Whether it is what NCCL, the store or gloo say when a process no longer answers; gloo has no type of its own."""
    kinds = (torch.distributed.DistError,) if torch.distributed.is_available() else ()
    return isinstance(error, kinds) or "gloo/transport" in str(error)
