"""The public signatures are the ones written down: a change of one is meant, and has a line in CHANGELOG.md.

``python tests/test_public.py`` writes them down anew.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import bandpo

SNAPSHOT = Path(__file__).parent / "truth" / "public.txt"


def signatures() -> str:
    """Every public name with its arguments; of a class its public methods and properties too."""
    lines = []
    for name in sorted(bandpo.__all__):
        thing = getattr(bandpo, name)
        lines.append(name + _arguments(thing))
        if inspect.isclass(thing):
            for member, value in sorted(vars(thing).items()):
                if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                    lines.append(f"  .{member}{_arguments(value)}")
    return "\n".join(lines) + "\n"


def _arguments(thing: object) -> str:
    try:
        return str(inspect.signature(thing)) if callable(thing) else ""
    except ValueError:
        return "(...)"


def test_public_signatures_are_the_ones_written_down() -> None:
    assert signatures() == SNAPSHOT.read_text("utf-8"), (
        "python tests/test_public.py writes them down; say it in CHANGELOG"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(signatures(), "utf-8")
