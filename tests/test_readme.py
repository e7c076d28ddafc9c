"""The README does what it says: its Python runs, its commands parse or run, the output shown is the output there is."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from bandpo import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str | None]]:
    """Blocks of a language, each with the text block that follows it at once, or None."""
    return [(m[2], m[3]) for m in BLOCK.finditer(README) if m[1] == language]


def commands(program: str) -> list[tuple[list[str], str | None]]:
    """The words after a program's name on every shell line, and the output shown."""
    lines = [(shlex.split(line, comments=True), shown) for text, shown in blocks("bash") for line in text.splitlines()]
    return [(words[1:], shown) for words, shown in lines if words and words[0] == program]


def test_every_shell_line_is_looked_at() -> None:
    words = [shlex.split(line, comments=True) for text, _ in blocks("bash") for line in text.splitlines()]
    assert {w[0] for w in words if w} == {"make", "bandpo", "pip"}


def test_python_blocks_run_and_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown_outputs = 0
    for code, shown in blocks("python"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "README.md", "exec"), names)
        if shown is not None:
            shown_outputs += 1
            assert out.getvalue().split() == shown.split()
    assert shown_outputs >= 2
    state = names["trainer"].state  # type: ignore[attr-defined]
    assert state.global_step == 8
    assert any(entry.get("clip/zero_grad_above", 0) > 0 for entry in state.log_history), "the clip acted"


@pytest.mark.parametrize(("words", "shown"), [pytest.param(w, s, id=" ".join(w)) for w, s in commands("bandpo")])
def test_commands(words: list[str], shown: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if shown is not None:  # only quick commands show their output
        assert words[0] in ("bounds", "explain") and cli.main(words) == 0
        out = capsys.readouterr().out
        if words[0] == "explain":  # the page shows an excerpt, in whole lines
            shown = "\n".join(line for line in shown.splitlines() if line)
            out = "\n".join(line.rstrip() for line in out.splitlines() if line.rstrip() in shown)
        assert out.split() == shown.split()
    args = cli._parse(words)
    if words[0] == "train" and not args.recipe.endswith(".yaml"):
        from bandpo.lab.recipe import load

        assert load(args.recipe, args.overrides).clip


@pytest.mark.parametrize("words", [w for w, _ in commands("make")])
def test_make_targets_exist(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)


def test_install_line_names_an_extra_that_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\[(\w+)\]", " ".join(word for words, _ in commands("pip") for word in words))
    assert named and set(named) <= set(extras)


def test_the_tree_is_the_tree() -> None:
    tree = next(text for text, _ in blocks("text") if text.startswith("src/bandpo/"))
    paths, parents = set(), {-1: ""}
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path = parents[depth - 1] + name
        parents[depth] = path
        paths.add(path)
        assert (ROOT / path).exists(), path
        assert len(line.split()) > 2 or name.endswith("/"), f"{name}: no comment"
    skipped = {"__init__.py", "__main__.py"}
    for file in (ROOT / "src" / "bandpo").rglob("*.py"):
        path = file.relative_to(ROOT)
        listed = str(path) in paths or f"{path.parent}/" in paths - {"src/bandpo/"}
        assert file.name in skipped or listed, f"{path} is not in the README's tree"


def test_links_and_picture_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_works_to_cite_are_named_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    for number in ["2603.04918", "1901.10314", "2602.04879"]:
        assert number in README and number in citation
