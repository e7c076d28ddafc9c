"""The look that every drawing of the project shares, and how one is written (needs matplotlib: extra ``train``)."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError
from bandpo.plots.slim import slim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b2027", "#5a6472", "#dfe3e8"
DASHED = (0, (4, 3))
COLOURS = ("#1f68c7", "#d06a12", "#23906a", "#9c4a9e", "#6d747e", "#b53f38")
RC = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "bandpo",
}


@dataclass(frozen=True)
class Theme:
    """The colours of a drawing that exists for light and for dark pages.

    Args:
        ink: of lines and titles.
        muted: of everything beside them.
        rule: of grids and of what is out of reach.
        colours: of the series, in the order of `COLOURS`.
        none: of no gradient.
        heat: of c / A from -20 by -1 to 0, and from 0 by 1 to 20.
    """

    ink: str
    muted: str
    rule: str
    colours: tuple[str, ...]
    none: str
    heat: tuple[str, ...]

    @property
    def rc(self) -> dict[str, Any]:
        """The settings of matplotlib: `RC` in these colours, on no ground of its own, and with text as text."""
        swap = {INK: self.ink, MUTED: self.muted, RULE: self.rule}
        own = {key: swap.get(value, value) if isinstance(value, str) else value for key, value in RC.items()}
        return own | {
            "savefig.transparent": True,
            "svg.fonttype": "none",
            "font.sans-serif": ["DejaVu Sans", "Arial"],
            "hatch.linewidth": 0.6,
        }


LIGHT = Theme(
    INK,
    MUTED,
    "#c3c9d1",
    COLOURS,
    "#eceef1",
    ("#6b2c00", "#e08a3c", "#fbe4cf", "#d6e6f8", "#5b9be0", "#08306b"),
)
DARK = Theme(
    "#e7ebf0",
    "#9ba7b4",
    "#39424e",
    ("#6fa9f7", "#f09b4c", "#55c79a", "#cf8bd1", "#a3abb6", "#f08a83"),
    "#3a424c",
    ("#ffe2c2", "#d9771f", "#4d2a0d", "#17335c", "#3f86dd", "#d4e8ff"),
)


def need_matplotlib() -> None:
    """Raise an InputError with the pip line when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("drawing needs matplotlib, which is not installed: pip install matplotlib") from None


def save(figure: Figure, path: str | Path, theme: Theme | None = None) -> Path:
    """Write a figure; the suffix says the format (svg, png, pdf).

    Args:
        figure: a matplotlib figure.
        path: where to.
        theme: that it was drawn in, where it has one.

    Returns:
        The path.

    Raises:
        InputError: the suffix is none of these, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("svg", "png", "pdf"):
        raise InputError(f"{path}: cannot draw to {kind or 'a file without a suffix'!r}; use .svg, .png or .pdf")
    drawn = _drawn(figure, kind, RC if theme is None else theme.rc)
    return _write(path, drawn if theme is None or kind != "svg" else slim(drawn))


def save_both(figure: Figure, path: Path) -> list[Path]:
    """Write a figure for light pages, and beside it NAME-dark.svg, the same in the colours of `DARK`; no ground.

    Args:
        figure: a matplotlib figure in the colours of this module.
        path: of the light one, an .svg.

    Returns:
        Both paths.

    Raises:
        InputError: it is no .svg, or cannot be written.
    """
    if path.suffix != ".svg":
        raise InputError(f"{path}: only an .svg is drawn for light and dark pages; use .svg")
    drawn = _drawn(figure, "svg", RC | {"savefig.transparent": True})
    own, theirs = (INK, MUTED, RULE, *COLOURS), (DARK.ink, DARK.muted, DARK.rule, *DARK.colours)
    swap = dict(zip(own, theirs, strict=True))
    dark = re.sub("#[0-9a-f]{6}", lambda found: swap.get(found[0], found[0]), drawn.decode("utf-8")).encode("utf-8")
    return [_write(path, drawn), _write(path.with_name(f"{path.stem}-dark.svg"), dark)]


def _drawn(figure: Figure, kind: str, rc: dict[str, Any]) -> bytes:
    from matplotlib import rc_context

    stamp = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
    drawn = io.BytesIO()
    with rc_context(rc):
        figure.savefig(drawn, format=kind, dpi=160, metadata=stamp)
    return drawn.getvalue()


def _write(path: Path, data: bytes) -> Path:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a folder that exists") from None
    return path
