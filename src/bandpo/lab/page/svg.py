"""Figures as parts of a page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from bandpo.plots import COLOURS, INK, MUTED, RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {colour: f"c{i}" for i, colour in enumerate(COLOURS)}


def inline(figure: Figure, label: str) -> str:
    """Return a figure as an ``<svg>`` element whose colours are the page's CSS variables and whose text is text.

    Args:
        figure: a matplotlib figure.
        label: what it shows, for screen readers; plain text without markup characters.

    Returns:
        The element, without XML header, metadata or anything that is fetched; put it into a template with ``|safe``.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib[._]axis|legend)_\d+"', "", svg)
    svg = re.sub(r"font: (?:bold )?([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>",
        rf'<svg viewBox="\1" role="img" aria-label="{label}" '
        r'xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
