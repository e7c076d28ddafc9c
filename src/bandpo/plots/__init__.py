"""Drawings of clips, and the look that every drawing of the project shares (needs matplotlib: extra ``train``).

``python -m bandpo.plots docs/img/bounds.svg`` draws the picture of the README, for light pages and for dark ones;
``python docs/draw.py`` all others.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bandpo._input import InputError
from bandpo.plots.bounds import draw_bounds as draw_bounds
from bandpo.plots.bounds import readme_clips as readme_clips
from bandpo.plots.look import COLOURS as COLOURS
from bandpo.plots.look import DASHED as DASHED
from bandpo.plots.look import INK as INK
from bandpo.plots.look import MUTED as MUTED
from bandpo.plots.look import RC as RC
from bandpo.plots.look import RULE as RULE
from bandpo.plots.look import need_matplotlib as need_matplotlib
from bandpo.plots.look import save as save
from bandpo.plots.look import save_both as save_both


def main(argv: list[str] | None = None) -> int:
    """Draw the README's picture to the file named on the command line; an .svg for dark pages too."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m bandpo.plots FILE.svg", file=sys.stderr)
        return 2
    try:
        figure, path = draw_bounds(readme_clips()), Path(arguments[0])
        print(*(save_both(figure, path) if path.suffix == ".svg" else [save(figure, path)]), sep="\n")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
