"""Every public name is on the API page, and the pages and pictures are those that the code makes."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

import bandpo
from bandpo import cli, plots

ROOT = Path(__file__).parent.parent
API = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), flags=re.MULTILINE))


def public_names() -> list[str]:
    from bandpo.engines import trl

    engine = [n for n, x in vars(trl).items() if not n.startswith("_") and getattr(x, "__module__", "") == trl.__name__]
    return [f"bandpo.{name}" for name in bandpo.__all__] + [f"bandpo.engines.trl.{name}" for name in engine]


def test_every_public_name_is_on_the_api_page() -> None:
    assert set(public_names()) - API == set()
    core = {name for name in API if name.count(".") == 1}
    assert core - {f"bandpo.{name}" for name in bandpo.__all__} == set(), "on the page, but not public"


@pytest.mark.parametrize("name", bandpo.__all__)
def test_every_public_docstring_says_what_it_takes(name: str) -> None:
    thing = getattr(bandpo, name)
    text = inspect.getdoc(thing) or ""
    if callable(thing) and not inspect.isclass(thing):
        assert "Args:" in text and "Returns:" in text, name
    for argument in inspect.signature(thing).parameters if callable(thing) and "Args:" in text else ():
        assert re.search(rf"^\s+\**{argument}( \(.*\))?:", text, flags=re.MULTILINE), (
            f"{name}: {argument} is not described"
        )


def test_commands_in_the_pages_parse() -> None:
    lines = [
        (page.name, line.strip())
        for page in (ROOT / "docs").glob("*.md")
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    bandpo_lines = [(page, shlex.split(line, comments=True)) for page, line in lines if line.startswith("bandpo ")]
    assert len(bandpo_lines) >= 10
    for page, words in bandpo_lines:
        assert cli._parse(words[1:]).handler, page


def test_every_divergence_is_in_the_method_page() -> None:
    from bandpo.family import FAMILY

    assert bandpo.get_divergence("alpha:0.5")
    method = (ROOT / "docs" / "method.md").read_text("utf-8")
    for name in [*FAMILY, "alpha:A"]:
        assert f"| `{name}` |" in method


def test_every_clip_is_in_the_commands_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for name in ("band", "fixed", "clip-higher", "none"):
        assert f"`{name}`" in page and bandpo.get_clip(name)


def test_the_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "bounds.svg"
    assert plots.main([str(drawn)]) == 0
    assert drawn.read_text("utf-8").count("<path") == (ROOT / "docs/img/bounds.svg").read_text("utf-8").count("<path")
    assert plots.main([]) == 2 and plots.main([str(tmp_path / "no" / "folder.svg")]) == 2
