"""What the pages point to is there: links, their anchors, files, pictures with words for them; and the pages' words."""

from __future__ import annotations

import ast
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")]
PAGES = sorted(DOCS.glob("*.md")) + sorted((DOCS / "clips").glob("*.md")) + ROOTS
SOURCES = sorted(p for part in ("src", "examples", "benchmarks") for p in (ROOT / part).rglob("*.*") if p.suffix in
                 {".py", ".j2", ".yaml", ".toml"})  # fmt: skip
FENCE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", flags=re.M | re.S)
THEIRS = {"examples/run_grpo.py"}  # files of other repositories
# What a page says, and what the field says.
WORDS = {
    r"in (?:the )?place of": "instead of",
    r"log[- ]?probs?|logprobs?": "log-probabilities, or `logps`",
    r"optimizers?|normaliz\w+|behaviors?|colors?": "the British spelling, as elsewhere",
    r"microbatch\w*": "micro-batch",
    r"roll-outs?": "rollout",
    r"hyper-?parameters?": "the names of what is set",
    r"clip(?:ping)? epsilon": "`eps`",
    r"trust[- ]region size": "radius `delta`",
}


class _Seen(HTMLParser):
    """What a page holds once it is HTML: ids, the targets of links, pictures with their words."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        src = found.get("src", "").removesuffix("#only-light").removesuffix("#only-dark")  # the theme's own marks
        self.pictures += [(src, found.get("alt", ""))] if tag == "img" else []


@cache
def seen(path: Path) -> _Seen:
    text = path.read_text("utf-8")
    found = _Seen()
    if path.suffix == ".md":
        for include in re.findall(r'^--8<-- "([^":]+\.md)"$', text, flags=re.M):
            text = text.replace(f'--8<-- "{include}"', (ROOT / include).read_text("utf-8"))
        found.ids |= set(re.findall(r"^::: (\S+)$", text, flags=re.M))  # mkdocstrings makes an anchor of each name
        text = markdown.markdown(text, extensions=["toc", "attr_list", "tables", "fenced_code", "admonition"])
    found.feed(text)
    return found


def on_github(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def github_anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text("utf-8"))
    return {on_github(heading) for heading in re.findall(r"^#{1,6} (.*)$", text, flags=re.M)}


def prose(path: Path) -> str:
    """A page without code, and without the targets of links."""
    text = FENCE.sub("", path.read_text("utf-8"))
    return re.sub(r"\]\([^)]*\)|<[^>]*>|`[^`]*`", " ", text)


def lesson(page: Path) -> Path:
    """The script of which the build of the pages makes a lesson's page."""
    return ROOT / "examples" / f"{page.stem}.py" if page.parent.name == "examples" else page


def wrong(source: Path, link: str) -> str | None:
    """What is wrong with a link, or None."""
    if re.match(r"[a-z]+:", link):
        return None if link.startswith(("https://", "mailto:")) else f"{link}: neither https nor within"
    name, _, anchor = link.partition("#")
    target = (source.parent / name).resolve() if name else source
    if not target.exists() and not lesson(target).exists():
        return f"{link}: there is no such file"
    if not target.is_relative_to(ROOT):
        return f"{link}: leads out of the repository"
    if not anchor:
        return None
    github = source in ROOTS and target.suffix == ".md"  # there GitHub shows them
    anchors = github_anchors(target) if github else seen(target).ids
    return None if anchor in anchors else f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    found = seen(page)
    assert [bad for link in found.links if (bad := wrong(page, link))] == []
    assert [src for src, alt in found.pictures if not (page.parent / src).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if "![" in p.read_text("utf-8") or "<img" in p.read_text("utf-8")],
                         ids=lambda p: str(p.relative_to(ROOT)))  # fmt: skip
def test_every_picture_has_words(page: Path) -> None:
    """Words that say what is to be seen."""
    for src, alt in seen(page).pictures:
        assert len(alt.split()) >= 4, (src, alt)


def test_what_the_program_says_of_the_pages_is_there() -> None:
    """Advice and messages name pages and headings."""
    named = [
        (source, link)
        for source in SOURCES
        for link in re.findall(r"docs/[\w\-/]+\.(?:md|html)(?:#[\w\-]+)?", source.read_text("utf-8"))
    ]
    tree = ast.parse((ROOT / "src/bandpo/analysis/advice.py").read_text("utf-8"))
    given = [node.value.elts[-1] for node in ast.walk(tree) if isinstance(node, ast.Yield)]  # type: ignore[union-attr]
    sections = {node.value for node in given if isinstance(node, ast.Constant)}
    assert len(named) >= 2 and len(sections) >= 4
    named += [(Path("advice"), f"docs/explain.md#{section}") for section in sections]
    assert [(str(s), bad) for s, link in named if (bad := wrong(ROOT / "README.md", link))] == []


def test_every_file_that_a_page_names_is_in_the_repository() -> None:
    named = re.compile(r"(?<![\w/.\-])(?:benchmarks|docs|examples|src/bandpo|studies|tests)/[\w\-./]+\.\w+")
    missing = [
        (str(page.relative_to(ROOT)), name)
        for page in PAGES
        for name in set(named.findall(page.read_text("utf-8"))) - THEIRS
        if "NAME" not in name and not any(place.exists() for place in (ROOT / name, lesson(ROOT / name)))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_pages_have_the_fields_words(page: Path) -> None:
    text = prose(page)
    found = {word: say for pattern, say in WORDS.items() for word in re.findall(rf"\b(?:{pattern})\b", text, re.I)}
    assert found == {}


def test_a_broken_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above, on a page where everything is wrong."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n\n[a](#two) [b](none.md) [c](page.md#one) [d](http://x)\n\n![](page.md)\nin place of log probs"
    )
    found = seen(page)
    assert [bool(wrong(page, link)) for link in found.links] == [True, True, False, True]
    assert found.pictures == [("page.md", "")] and found.ids == {"one"}
    assert [p for p in WORDS if re.search(rf"\b(?:{p})\b", prose(page))] == list(WORDS)[:2]
    assert on_github("The **loss**, in `two` [lines](x.md)") == "the-loss-in-two-lines"
