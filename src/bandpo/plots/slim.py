"""SVG as matplotlib writes it, in a third of the bytes: the docs have more than a hundred of them."""

from __future__ import annotations

import re

FONT = "'DejaVu Sans', 'Arial', sans-serif"  # of `Theme.rc`


def slim(svg: bytes) -> bytes:
    """Return the same drawing without metadata, repeated styles, idle groups and digits that nobody sees.

    Args:
        svg: what matplotlib wrote under `Theme.rc`.

    Returns:
        The drawing; its bitmaps are smoothed by the reader.
    """
    text = re.sub(r"<metadata>.*?</metadata>", "", svg.decode(), flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = text.replace(' style="image-rendering:crisp-edges;image-rendering:pixelated"', "")
    text = text.replace(f"font-family: {FONT}; ", "")
    text = re.sub(r"<(?!image)[^>]+>", _two_digits, text)
    text = re.sub(r' d="[^"]*"', _no_blanks, text)
    styles = {style: f"s{i}" for i, style in enumerate(dict.fromkeys(re.findall(r' style="([^"]*)"', text)))}
    text = re.sub(r' style="([^"]*)"', lambda found: f' class="{styles[found[1]]}"', text)
    rules = "".join(f".{name}{{{style}}}" for style, name in styles.items())
    text = text.replace("*{stroke", f"text{{font-family:{FONT}}}{rules}*{{stroke", 1)
    return (re.sub(r"\s*\n\s*", "\n", _flat(text)).strip() + "\n").encode()


def _two_digits(tag: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", tag[0])


def _no_blanks(path: re.Match[str]) -> str:
    return ' d="' + re.sub(r"\s*([A-Za-z])\s*", r"\1", path[0][4:])


def _flat(svg: str) -> str:
    """The drawing without the groups that do nothing but nest."""
    acts: list[bool] = []
    parts = []
    for part in re.split(r"(<g\b[^>]*>|</g>)", svg):
        if part == "</g>":
            parts.append(part if acts.pop() else "")
        elif not part.startswith("<g"):
            parts.append(part)
        elif not part.endswith("/>"):
            acts.append(bool(re.search("clip-path|class|transform|opacity", part)))
            parts.append(part if acts[-1] else "")
    return "".join(parts)
