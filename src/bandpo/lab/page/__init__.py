"""Pages: one HTML file each that needs neither network nor any other file; jinja2, everything escaped."""

from __future__ import annotations

import importlib.resources
import os
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

from bandpo._input import InputError

WHERE = "bandpo.lab.page"
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # control, format (bidirectional too), surrogates, private, separators


def visible(text: object) -> str:
    """Return text with every character that a reader would not see written as its code point; newline and tab stay."""
    return "".join(
        f"⟨U+{ord(x):04X}⟩" if unicodedata.category(x) in HIDDEN and x not in "\n\t" else x for x in str(text)
    )


def render(template: str, title: str, **values: Any) -> str:
    """Return a page: the shared frame around a template.

    Args:
        template: the name of a file beside this one, which extends page.html.j2.
        title: of the page.
        **values: what the template names; text is escaped, figures are `markupsafe.Markup`.

    Returns:
        A whole HTML document.

    Raises:
        InputError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError:
        raise InputError("a page needs jinja2: pip install jinja2, or leave --html out") from None
    places = jinja2.FunctionLoader(_read)
    made = jinja2.Environment(
        loader=places, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.finalize = lambda x: visible(x) if type(x) is str else x
    made.filters["visible"] = visible
    return made.get_template(template).render(title=title, css=_css(), **values)


def write(page: str, path: Path) -> Path:
    """Write a page so that a reader, or a full disk, never meets half of it, and return its path.

    Raises:
        InputError: it cannot be written; what was there stays.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists") from None
    return path


def _read(name: str) -> str | None:
    file = importlib.resources.files(WHERE).joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _css() -> Any:
    from markupsafe import Markup

    return Markup(importlib.resources.files(WHERE).joinpath("page.css").read_text(encoding="utf-8"))
