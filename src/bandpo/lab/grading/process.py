"""The trainer's end of the grading process: started once, shared by all tasks and threads, started anew if it dies."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from threading import RLock
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError
from bandpo.lab.grading import Grade

if TYPE_CHECKING:
    from bandpo.lab.tasks.base import Task

START_LIMIT = 300.0  # seconds until a process that was started has answered; imports on a slow disk take long
SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|_KEY$|APIKEY", re.IGNORECASE)
# One thread each: the process forks, and threads do not survive that. One hash seed: sets have one order everywhere.
FIXED = {key: "1" for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} | {
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}
_numbers = itertools.count()
_processes: dict[int, GradingProcess] = {}  # by process id: a fork of the trainer starts its own
_lock = RLock()


def shared() -> GradingProcess:
    """The grading process of this process.

    Returns:
        The one that runs, or a new one.
    """
    with _lock:
        found = _processes.get(os.getpid())
        if found is None or found.closed:
            found = _processes[os.getpid()] = GradingProcess()
        return found


class GradingProcess:
    """A process of its own that holds tasks, makes problems and grades answers."""

    def __init__(self) -> None:
        """Start it; it ends by itself when this one does."""
        ours, theirs = socket.socketpair()
        environment = {key: value for key, value in os.environ.items() if not SECRET.search(key)}
        environment |= FIXED | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        code = f"from bandpo.lab.grading.worker import main; main({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(  # not multiprocessing: that would run the user's script a second time
                [sys.executable, "-P", "-c", code],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._number, self._owner = next(_numbers), os.getpid()
        self._lock = RLock()
        atexit.register(self.close)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._connection.closed or self._process.poll() is not None

    def close(self) -> None:
        """End it; in a fork of the process that started it, only let go of it."""
        atexit.unregister(self.close)
        self._connection.close()
        if self._process.returncode is None and os.getpid() == self._owner:
            self._process.kill()
            self._process.wait()

    def grade(self, task: Task, jobs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Grade]:
        """Score answers.

        Args:
            task: whose `score` to use.
            jobs: each answer with its problem.

        Returns:
            One grade per answer.

        Raises:
            InputError: the task cannot be sent.
        """
        answers = self._ask(task, "grade", list(jobs), replies=len(jobs), limit=20 * task.time_limit + START_LIMIT)
        return [Grade(*answer) for answer in answers]

    def call(self, task: Task, method: str, *args: Any) -> Any:
        """Call a method of the task in the process, without a seal or a time limit.

        Args:
            task: the task.
            method: its name.
            *args: plain values.

        Returns:
            What it returns, as JSON carries it.

        Raises:
            InputError: what it raises.
        """
        reply = self._ask(task, "call", method, args, replies=1, limit=None)[0]
        if "error" in reply:
            raise InputError(reply["error"])
        return reply["value"]

    def _ask(self, task: Task, *message: Any, replies: int, limit: float | None) -> list[Any]:
        """The replies to a message about a task; a process that has died meanwhile is replaced once."""
        for attempt in (self, None):
            process = attempt or shared()
            try:
                with process._lock:
                    key = process._add(task)
                    process._connection.send_bytes(pickle.dumps((message[0], key, *message[1:])))
                    return [process._reply(limit) for _ in range(replies)]
            except (EOFError, OSError):
                process.close()
            except InputError:
                raise
            except BaseException:  # replies are still to come, which nobody must take for others
                process.close()
                raise
        raise RuntimeError(f"the process that grades task {task.name!r} died twice; is the memory full?")

    def _add(self, task: Task) -> int:
        """The task's number in the process, which gets a copy of it the first time."""
        number, key = task.__dict__.get("_key", (None, None))
        if number == self._number and key is not None:
            return int(key)
        try:
            kind = type(task)
            if kind.__module__ == "__main__":
                raise TypeError("it is defined in the script itself")
            copy = pickle.dumps(task)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise InputError(
                f"task {task.name!r}: cannot be sent to the process that grades ({error}); put it into a file of its "
                "own, or set grading = 'direct' in the class when its score only compares strings"
            ) from error
        key = next(_numbers)
        file = getattr(sys.modules[kind.__module__], "__file__", "") if is_user_file(kind.__module__) else ""
        self._connection.send_bytes(pickle.dumps(("add", key, file, copy)))
        if problem := self._reply(START_LIMIT)["error"]:
            raise InputError(f"task {task.name!r}: cannot be loaded in the process that grades: {problem}")
        task.__dict__["_key"] = (self._number, key)
        return key

    def _reply(self, limit: float | None) -> Any:
        if limit is not None and not self._connection.poll(limit):
            raise EOFError
        return json.loads(self._connection.recv_bytes())


def is_user_file(module: str) -> bool:
    """Whether a module was imported from a file by its path.

    Args:
        module: the module's name.

    Returns:
        True for a name that `bandpo._input` gave.
    """
    return module.startswith("bandpo_user_")
