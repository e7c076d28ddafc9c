"""The pictures of the clips are those of today's clips, every one is used, and together they stay small."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.image import imread

import bandpo
from bandpo import cli
from bandpo.lab.cards.write import PAGES, THEMES, hard_first, write_pictures
from bandpo.plots import surface
from bandpo.plots.heat import _colours
from bandpo.plots.look import DARK, LIGHT
from bandpo.plots.regions import boundaries

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "img" / "clips"
NAMES = bandpo.list_clips()
SIZE = 97  # pixels of a heat map, each way
AT = torch.arange(4, SIZE, 11)  # those that are looked at
PROBES = ((0, 0), (-0.48, -0.48), (-0.48, 0.48), (0.48, -0.48), (0.48, 0.48))  # within each


def heats(name: str) -> list[npt.NDArray[np.float64]]:
    """The bitmaps of a kept picture but for the colour bar: rows of ratio upwards, columns of p."""
    svg = (FOLDER / f"{name}.svg").read_text("utf-8")
    pictures = re.findall(r'<image xlink:href="data:image/png;base64,([^"]*)"[^>]*width="97" height="97"', svg)
    return [np.asarray(imread(io.BytesIO(base64.b64decode(picture))), float) for picture in pictures]


def colours(clip: bandpo.Clip, piece: surface.Slice, sign: float, dx: float, dy: float) -> npt.NDArray[np.float64]:
    """The colours of c / A beside the middles of the pixels looked at; NaN where q would be above 1."""
    log_p = math.log(1e-4) * (1 - (AT + 0.5 + dx) / SIZE).double()
    log_r = math.log(20) * (2 * (AT + 0.5 + dy) / SIZE - 1).double()
    grid_r, grid_p = torch.meshgrid(log_r, log_p, indexing="ij")
    c = surface.coefficient(clip, piece, grid_p.flatten(), grid_r.flatten(), sign).view_as(grid_p).numpy()
    scale = _colours(LIGHT)
    painted = np.asarray(scale["cmap"](scale["norm"](np.nan_to_num(c))))
    painted[c == 0] = to_rgba(LIGHT.none)
    painted[np.isnan(c)] = np.nan
    return painted


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_picture_is_of_todays_clip(name: str) -> None:
    clip = bandpo.get_clip(name)
    wanted = [(piece, sign) for piece in surface.slices(clip) for sign in (1.0, -1.0)]
    kept = heats(name)
    assert len(kept) == len(wanted)
    for (piece, sign), picture in zip(wanted, kept, strict=True):
        beside = [colours(clip, piece, sign, dx, dy) for dx, dy in PROBES]
        even = np.ptp(np.stack(beside), axis=0).max(-1) < 0.03  # no edge within the pixel, and not NaN
        assert even.mean() > 0.5
        drawn = picture[np.ix_(AT.numpy(), AT.numpy())]
        assert np.abs(drawn - beside[0])[even].max() < 0.03, f"{name}: run `python -m bandpo.lab.cards docs --pictures`"
        assert (drawn[np.isnan(np.stack(beside)).all((0, -1))][:, 3] == 0).all(), "a colour past q = 1"


def test_a_picture_drawn_now_is_the_kept_one(tmp_path: Path) -> None:
    for path in write_pictures(tmp_path, ["up_grpo"]):
        drawn, kept = path.read_text("utf-8"), (FOLDER / path.name).read_text("utf-8")
        for part in ("<path", "<text", "<image"):
            assert drawn.count(part) == kept.count(part), path.name
        assert re.findall(r"<text[^>]*>([^<]*)", drawn) == re.findall(r"<text[^>]*>([^<]*)", kept)


def test_every_clip_is_on_the_atlas_once_for_each_sign() -> None:
    hard, soft = hard_first()
    assert sorted(hard + soft) == sorted(NAMES)
    for page, names in (("hard", hard), ("soft", soft)):
        for sign in ("up", "down"):
            svg = (FOLDER / f"atlas-{page}-{sign}.svg").read_text("utf-8")
            titles = [x for x in re.findall(r"<text[^>]*>([^<]*)", svg) if x in NAMES]
            assert titles == [name for name in names for _ in surface.slices(bandpo.get_clip(name))], page


def test_every_region_is_drawn_once_with_those_that_are_the_same() -> None:
    groups = [names for names, _ in boundaries()]
    drawn = [name for names in groups for name in names]
    assert sorted(drawn) == sorted(name for name in NAMES if bandpo.get_clip(name).boundary is not None)
    together = {name: names for names in groups for name in names}
    assert "dual_clip" in together["fixed"] and "clip_higher" not in together["fixed"]
    assert together["band"] != together["trgppo"], "the same constraint at another radius"
    svg = (FOLDER / "atlas-regions.svg").read_text("utf-8")
    said = " ".join(re.findall(r"<text[^>]*>([^<]*)", svg))
    assert all(re.search(rf"\b{name}\b", said) for name in drawn)


def test_every_picture_is_used_with_words_for_those_who_cannot_see_it() -> None:
    used: dict[str, str] = {}
    picture = r"!\[([^]]*)\]\((?:\.\./)?img/clips/(\S+?)#only-(\w+)\)"
    for page in [DOCS / "atlas.md", *(DOCS / "clips").glob("*.md")]:
        for words, name, theme in re.findall(picture, page.read_text("utf-8")):
            assert len(words) > 60 and theme == ("dark" if name.endswith("-dark.svg") else "light"), name
            used[name] = words
    kept = {path.name for path in FOLDER.iterdir()}
    assert used.keys() == kept == {f"{name}{end}.svg" for name in (*NAMES, *PAGES) for end in THEMES}


def test_the_pictures_are_small_and_stand_for_themselves() -> None:
    files = list(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < 2_000_000
    for path in files:
        svg, theme = path.read_text("utf-8"), DARK if path.stem.endswith("-dark") else LIGHT
        assert path.stat().st_size < 80_000 and not re.search(r'href="(?!data:|#)|@import|<script', svg), path.name
        assert theme.ink in svg, f"{path.name}: not in the colours of its page"


@pytest.mark.parametrize("words", [["--plot", "all.svg"], ["spo", "--plot", "spo.png"]])
def test_the_command_draws(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["clips", *words]) == 0
    assert f"drawn: {words[-1]}" in capsys.readouterr().out
    start = (tmp_path / words[-1]).read_bytes()[:4]
    assert start == (b"\x89PNG" if words[-1].endswith("png") else b"<?xm")
