"""The process that grades: it holds tasks, and forks a child for the answers, which it replaces when one hangs.

The child talks JSON to it, and it talks JSON to the trainer: nothing that a model's text may have touched is unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from bandpo._input import _import_file
from bandpo.lab.grading import Grade, checked, reason, seal

LIFETIME = 5000  # answers of one child: what libraries keep in their caches goes with it


def main(fd: int) -> None:
    """Serve until the trainer closes its end.

    Args:
        fd: the socket to the trainer.
    """
    server = _Server(Connection(fd))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            server.serve(*pickle.loads(server.connection.recv_bytes()))
    server.end_children()


class _Server:
    """The tasks, and one child for each way of grading."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.tasks: dict[int, Any] = {}
        self.children: dict[str, _Child] = {}

    def serve(self, kind: str, key: int, *rest: Any) -> None:
        if kind == "grade":
            for text, row in rest[0]:
                grade = self.grade(key, text, row)
                self.reply([grade.score, grade.why])
        else:
            self.end_children()  # they know nothing of what comes now
            self.reply(self.add(key, *rest) if kind == "add" else self.call(key, *rest))

    def reply(self, message: Any) -> None:
        self.connection.send_bytes(json.dumps(message).encode())

    def add(self, key: int, file: str, copy: bytes) -> dict[str, str]:
        try:
            if file:
                _import_file(Path(file))
            self.tasks[key] = pickle.loads(copy)
        except Exception as error:
            return {"error": reason(error)}
        return {"error": ""}

    def call(self, key: int, method: str, args: tuple[Any, ...]) -> dict[str, Any]:
        try:
            return {"value": getattr(self.tasks[key], method)(*args)}
        except Exception as error:
            return {"error": str(error)}

    def grade(self, key: int, text: str, row: Mapping[str, Any]) -> Grade:
        task = self.tasks[key]
        try:
            if task.prepare(row):
                self.end_children()
        except Exception as error:
            return Grade(0.0, reason(error))
        child = self.children.get(task.grading)
        if child is None or child.graded >= LIFETIME:
            if child:
                child.end()
            child = self.children[task.grading] = _Child(self, task.grading == "sealed")
        grade = child.grade(key, text, row, task.time_limit)
        if grade is None:
            grade = Grade(0.0, child.end())
            del self.children[task.grading]
        return grade

    def end_children(self) -> None:
        while self.children:
            self.children.popitem()[1].end()


class _Child:
    """A fork of this process that grades, and that may hang or crash."""

    def __init__(self, server: _Server, sealed: bool) -> None:
        self.graded, self.limit, self.hung_up = 0, 0.0, False
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                server.connection.close()
                self.connection.close()
                _grade_until_the_end(theirs, server.tasks, sealed)
            finally:
                os._exit(1)
        theirs.close()

    def grade(self, key: int, text: str, row: Mapping[str, Any], limit: float) -> Grade | None:
        """The grade, or None from a child that hangs or has died."""
        self.graded, self.limit = self.graded + 1, limit
        try:
            self.connection.send_bytes(pickle.dumps((key, text, row, limit)))
            if not self.connection.poll(10 * limit):
                return None
            score, why = json.loads(self.connection.recv_bytes())
            return Grade(float(score), str(why))
        except (EOFError, OSError, ValueError):
            self.hung_up = True
            return None

    def _ended(self, seconds: float) -> tuple[int, int]:
        """Its id and status once it is dead; 0 and 0 when it is alive after so many seconds."""
        until = time.monotonic() + seconds
        while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0 and time.monotonic() < until:
            time.sleep(0.001)
        return found

    def end(self) -> str:
        """Kill it, and say how it ended."""
        self.connection.close()
        pid, status = self._ended(1.0 if self.hung_up else 0.0)
        if pid == 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if pid == 0 or os.waitstatus_to_exitcode(status) == -signal.SIGPROF:
            return f"timeout: took more than {self.limit:g} s"
        return f"crash: the grader died with status {os.waitstatus_to_exitcode(status)}"


def _grade_until_the_end(connection: Connection, tasks: dict[int, Any], sealed: bool) -> None:
    """The child's whole life."""
    seal.limit_memory()
    if sealed:
        seal.seal()
    while True:
        key, text, row, limit = pickle.loads(connection.recv_bytes())
        seal.refused.clear()
        # The limit is on the processor's time, so that a busy machine changes no grade; the kernel ends the process.
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            grade = checked(tasks[key].score(text, row))
        except BaseException as error:
            grade = Grade(0.0, reason(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        if seal.refused and grade.score == 0:
            grade = Grade(0.0, f"refused: {seal.refused[0]}"[:200])
        connection.send_bytes(json.dumps([grade.score, grade.why]).encode())


if sys.platform == "win32":
    raise ImportError("grading in a process of its own needs os.fork, which Windows lacks; use WSL")
