"""What a run says while it runs: one live line on a terminal, plain lines elsewhere, or one JSON object a line."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from bandpo.lab.page import visible

NOTE_SECONDS = 10.0  # off a terminal, how often a long job says how far it is


class Display:
    """Takes a run's events and shows none of them: for processes other than the first, and for tests.

    An event is a dict with the key "event": "note" (text), "start", "step", "eval", "failed", "summary" or "done".
    """

    def emit(self, event: dict[str, Any]) -> None:
        """Show an event."""

    def note(self, text: str) -> None:
        """Say in a line what is being done."""
        self.emit({"event": "note", "text": text})

    def progress(self, what: str, share: float) -> None:
        """Say how far a job is that comes before the training: the share of it that is done, 0 to 1."""

    def __enter__(self) -> Self:
        """Start showing."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""


class JsonDisplay(Display):
    """One JSON object a line.

    Args:
        file: where to; None for stdout.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        self.file = file or sys.stdout

    def emit(self, event: dict[str, Any]) -> None:
        """Write the event as one line."""
        print(json.dumps(event), file=self.file, flush=True)


class HumanDisplay(Display):
    """For people: one live line where the console is a terminal, else a line for each rollout.

    Args:
        console: where to; None for stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = Status("", console=self.console) if self.console.is_terminal else None
        self._seen: dict[str, list[float]] = {}
        self._rollout, self._text = -1, ""
        self._noted = 0.0
        self._arm = ""

    def __enter__(self) -> Self:
        """Start the live line."""
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the live line away."""
        if self.live:
            self.live.stop()

    def emit(self, event: dict[str, Any]) -> None:
        """Show the event."""
        kind = event["event"]
        if kind == "step":
            self._step(event)
        elif kind == "note":
            self._print(event["text"])
        elif kind == "start":
            self._rollout, self._arm = -1, event.get("arm", "")
            self._print(_start_text(event))
        elif kind == "eval":
            self._end_rollout()
            entropy = f", entropy {event['entropy']:.3f}" if event.get("entropy") is not None else ""
            found = f"held-out accuracy {_accuracy(event)}{entropy}"
            self._print(f"{self._arm or 'step'} {event['step']}: {found}")
        elif kind == "summary":
            self.console.print(closing_table(event))

    def progress(self, what: str, share: float) -> None:
        """Show how far a job is, as the live line or now and then."""
        text = f"{what}: {share:.0%}" if 0 < share < 1 else what
        if self.live:
            self.live.update(escape(text))
        elif time.monotonic() - self._noted > NOTE_SECONDS and 0 < share < 1:
            self._noted = time.monotonic()
            self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(visible(text), markup=False)

    def _step(self, event: dict[str, Any]) -> None:
        if event["rollout"] != self._rollout:
            self._end_rollout()
            self._rollout, self._seen = event["rollout"], {"reward": [], "entropy": [], "clipped": []}
        for key, values in self._seen.items():
            if key in event:
                values.append(event[key])
        means = {key: sum(values) / len(values) for key, values in self._seen.items() if values}
        self._text = _step_text(event, means, self._arm or "step")
        if self.live:
            self.live.update(escape(self._text))

    def _end_rollout(self) -> None:
        """Off a terminal, print the line of a rollout once all its steps are made."""
        if self._text and not self.live:
            self._print(self._text)
        self._text = ""


def _start_text(event: dict[str, Any]) -> str:
    arm = f"arm {event['arm']}: " if event.get("arm") else ""
    args = ", ".join(f"{key} {value}" for key, value in (event.get("clip_args") or {}).items())
    resumed = f", from step {event['from_step']}" if event.get("from_step") else ""
    return (
        f"{arm}task {event['task']}, model {event['model']}, clip {event['clip']}{f' ({args})' if args else ''}: "
        f"{event['steps']} steps, {event['rollouts']} rollouts{resumed}, into {event['out']}"
    )


def _step_text(event: dict[str, Any], means: dict[str, float], name: str) -> str:
    """One line that fits a terminal of 80 columns; the means are over this rollout's steps."""
    left = int(event["left"])
    parts = [
        f"{name} {event['step']}/{event['steps']}",
        f"rollout {event['rollout']}",
        f"{left // 60}:{left % 60:02d} left",
        *(f"{key} {means[key]:.2f}" for key in ("reward", "entropy") if key in means),
        f"clipped {means['clipped']:.1%}" if "clipped" in means else "",
    ]
    return "  ".join(part for part in parts if part)


def _accuracy(event: dict[str, Any]) -> str:
    return f"{event['accuracy']:.3f} [{event['low']:.2f}, {event['high']:.2f}]"


def closing_table(event: dict[str, Any]) -> Table:
    """The table a run ends with, of the "summary" event: clip, before, after, clipped and error of each run."""
    table = Table(caption=f"report: {event['report']}", caption_style="", caption_justify="left")
    for column in ("clip", "held out before", "after [95 %]", "entropy", "clipped"):
        table.add_column(column)
    for run in event["runs"]:
        before, after = run["before"], run["after"]
        row = [escape(visible(run["clip"])), _accuracy(before) if before else ""]
        if after is None:
            row += [escape(visible(f"stopped: {run['error']}"))]
        else:
            clipped = "" if run["clipped"] is None else f"{run['clipped']:.1%}"
            entropies = [(score or {}).get("entropy") for score in (before, after)]
            entropy = f"{entropies[0]:.3f} to {entropies[1]:.3f}" if None not in entropies else ""
            row += [_accuracy(after), entropy, clipped]
        table.add_row(*row)
    return table
