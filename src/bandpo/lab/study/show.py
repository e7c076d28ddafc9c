"""What a study says while it runs: a live table on a terminal, a line for each run elsewhere, or JSON lines."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bandpo.lab.page import visible
from bandpo.lab.study.folder import StudyFolder
from bandpo.lab.study.matrix import Planned
from bandpo.lab.study.runner import FINAL, Work


class Shown:
    """Takes what happens in a study, and shows it.

    Args:
        folder: the study's folder.
        runs: its runs.
        as_json: whether as one JSON object a line.
        console: for people.
        live: the live table, where the console is a terminal.
    """

    def __init__(
        self, folder: StudyFolder, runs: Sequence[Planned], as_json: bool, console: Console, live: Live | None
    ) -> None:
        self.folder, self.runs, self.as_json, self.console, self.live = folder, runs, as_json, console, live
        self.started, self.ended = time.monotonic(), 0
        self._looked = 0.0

    def note(self, line: str) -> None:
        """Show a line."""
        if self.as_json:
            print(json.dumps({"event": "note", "text": line}), flush=True)
        else:
            self.console.print(visible(line), markup=False, highlight=False)

    def tell(self, event: dict[str, Any]) -> None:
        """Show that a run or a model has ended."""
        self.ended += event["event"] == "run"
        if self.as_json:
            print(json.dumps(event), flush=True)
        elif event["status"] != "done":
            self.note(f"{event['name']} {event['status']}: {event['error']}")
        elif not self.live and event["event"] == "run":
            score = "" if event["accuracy"] is None else f", held-out accuracy {event['accuracy']:.3f}"
            self.note(f"{event['name']} done in {event['seconds']:.0f} s{score}; {event['left']} left")
        elif not self.live:
            self.note(f"model {event['name']} made")

    def watch(self, work: Work) -> None:
        """Draw the live table anew, twice a second at most."""
        if self.live and time.monotonic() - self._looked > 0.5:
            self._looked = time.monotonic()
            self.live.update(self._table(work))

    def closing(self, result: dict[str, Any]) -> str:
        """The text that a study ends with."""
        from bandpo.lab.report.study import as_text

        return as_text(result)

    def _table(self, work: Work) -> Group:
        with work.turn:
            running, records = dict(work.running), list(work.records.runs)
        done = Counter((r.arm, r.setting) for r in records if r.status in FINAL)
        bad = Counter((r.arm, r.setting) for r in records if r.status not in FINAL)
        all_of = Counter((run.arm, run.setting) for run in self.runs)
        settings = list(dict.fromkeys(run.setting for run in self.runs))
        table = Table("arm", *settings)
        for arm in dict.fromkeys(run.arm for run in self.runs):
            cells = [
                f"{done[arm, s]}/{all_of[arm, s]}" + (f", {bad[arm, s]} failed" if bad[arm, s] else "")
                if all_of[arm, s]
                else ""
                for s in settings
            ]
            table.add_row(visible(arm), *cells)
        lines = [self._line(name, one) for name, one in running.items()]
        return Group(table, *(Text(line) for line in [*lines, self._left(work)]))

    def _line(self, name: str, one: Any) -> str:
        if not isinstance(one, Planned):
            return f"  {name}: warming up"
        at = self.folder.progress_of(one)
        return f"  {name}: rollout {at}/{one.rollouts}" if at else f"  {name}: starting"

    def _left(self, work: Work) -> str:
        spent, left = time.monotonic() - self.started, len(work.left) + len(work.running)
        eta = f", about {_clock(spent / self.ended * left)} left" if self.ended else ""
        return f"  {self.ended} runs ended in {_clock(spent)}, {left} to go{eta}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextmanager
def showing(folder: StudyFolder, runs: Sequence[Planned], *, as_json: bool) -> Iterator[Shown]:
    """Show what happens in a study for the length of the block.

    Args:
        folder: the study's folder.
        runs: its runs.
        as_json: whether as one JSON object a line.

    Yields:
        What takes the events.
    """
    console = Console(highlight=False, soft_wrap=True)
    if as_json or not console.is_terminal:
        yield Shown(folder, runs, as_json, console, None)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield Shown(folder, runs, as_json, console, live)
