"""Every public name is on the API page, and the pages and pictures are those that the code makes."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

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
        assert ("Args:" in text) == bool(inspect.signature(thing).parameters) and "Returns:" in text, name
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
    from bandpo.operator.family import FAMILY

    assert bandpo.get_divergence("alpha:0.5")
    method = (ROOT / "docs" / "method.md").read_text("utf-8")
    for name in [*FAMILY, "alpha:A"]:
        assert f"| `{name}` |" in method


def test_every_clip_is_on_the_clips_page() -> None:
    page = (ROOT / "docs" / "clips.md").read_text("utf-8")
    for name in bandpo.list_clips():
        assert re.search(rf"^\| `{name}` \|", page, flags=re.MULTILINE), name


@pytest.mark.parametrize("name", ["clips", "old-policy"])
def test_the_pages_examples_print_what_is_shown(name: str) -> None:
    page, names = (ROOT / "docs" / f"{name}.md").read_text("utf-8"), {}
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", page, flags=re.M | re.S)
    assert blocks
    for code, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, f"{name}.md", "exec"), names)
        assert out.getvalue() == shown


def test_the_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "bounds.svg"
    assert plots.main([str(drawn)]) == 0
    kept = ROOT / "docs/img/bounds.svg"
    for suffix in ("", "-dark"):
        ours, theirs = (path.with_stem(path.stem + suffix).read_text("utf-8") for path in (drawn, kept))
        assert ours.count("<path") == theirs.count("<path")
    assert plots.main([]) == 2 and plots.main([str(tmp_path / "no" / "folder.svg")]) == 2


def test_every_picture_has_a_light_and_a_dark_form_without_a_ground_of_its_own() -> None:
    pages = [path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")]
    named = [name for page in pages for name in re.findall(r"!\[[^\]]*\]\(\S*img/(\S+)\)", page)]
    assert len(named) > 90
    for name in named:
        stem = name.split(".svg#only-")[0].removesuffix("-dark")
        assert name in (f"{stem}.svg#only-light", f"{stem}-dark.svg#only-dark"), name
        assert {f"{stem}.svg#only-light", f"{stem}-dark.svg#only-dark"} <= set(named), name
    for path in (ROOT / "docs/img").rglob("*.svg"):
        ground = re.search(r'id="patch_1">\s*<path[^>]*style="fill: (\S+?)[";]', path.read_text("utf-8"))
        assert ground is None or ground[1] == "none", path
    readme = (ROOT / "README.md").read_text("utf-8")
    assert '<source media="(prefers-color-scheme: dark)" srcset="docs/img/bounds-dark.svg">' in readme


def test_the_operators_pictures_are_what_their_command_draws(tmp_path: Path) -> None:
    draw, page = runpy.run_path(str(ROOT / "docs/draw.py")), (ROOT / "docs/operator.md").read_text("utf-8")
    draw["main"](tmp_path)
    for name in draw["PICTURES"]:
        drawn, kept = ((folder / f"{name}.svg").read_text("utf-8") for folder in (tmp_path, ROOT / "docs/img"))
        assert drawn.count("<path") == kept.count("<path") and f"(img/{name}.svg#only-light)" in page
        ours, theirs = (re.findall(r'<g id="line2d_.*?<path d="(.*?)"', x, flags=re.DOTALL) for x in (drawn, kept))
        assert len(ours) == len(theirs) > 10
        for a, b in zip(ours, theirs, strict=True):  # in points: the look may differ between versions, no curve may
            want = pytest.approx([float(x) for x in re.findall(r"-?[\d.]+", b)], abs=1.0)
            assert [float(x) for x in re.findall(r"-?[\d.]+", a)] == want
    for name, delta in draw["matched_radii"]().items():
        assert re.search(rf"^\| `{name}` \|.*\| {delta:.4f} \|", page, flags=re.MULTILINE), name


def test_the_operators_example_prints_what_is_shown() -> None:
    page = (ROOT / "docs/operator.md").read_text("utf-8")
    (code, shown), *more = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page, flags=re.M | re.S)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "operator.md", "exec"), {})
    assert out.getvalue() == shown and not more


def test_the_intervals_have_the_names_that_the_operators_page_gives_them() -> None:
    n, z = 100, 1.959963984540054
    for k in (3, 37):
        share = k / n
        log_p = torch.tensor([share], dtype=torch.float64).log()

        def interval(name: str, delta: float, share: float = share, log_p: torch.Tensor = log_p) -> list[float]:
            bounds = bandpo.band(log_p, delta, name)
            return [share * bounds.low.item(), share * bounds.high.item()]

        wald, angle = z * math.sqrt(share * (1 - share) / n), math.asin(math.sqrt(share))
        wilson = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert interval("neyman", z * z / n) == pytest.approx(list(wilson))
        assert interval("chi2", z * z / n) == pytest.approx([max(share - wald, 0), share + wald])
        arcsine = [math.sin(max(angle + s * z / 2 / math.sqrt(n), 0)) ** 2 for s in (-1, 1)]
        assert interval("hellinger", 2 - 2 * math.cos(z / 2 / math.sqrt(n))) == pytest.approx(arcsine)
        for order in (0, 1, -2 / 3):
            for q in interval(f"alpha:{order}", z * z / (2 * n)):
                observed, expected = [k, n - k], [q * n, (1 - q) * n]
                statistic = stats.power_divergence(observed, expected, lambda_=-order).statistic
                assert statistic == pytest.approx(z * z), (order, k)


def test_the_built_site_fetches_nothing_and_typesets_nothing(tmp_path: Path) -> None:
    """Formulas are plain text, so that a page opened from disk, without a network, is whole."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    elsewhere = re.compile(r'\b(?:src|srcset|data|poster|action|href)\s*=\s*"?(?:https?:)?//')
    for page in pages:
        html = page.read_text("utf-8")
        tags = re.findall(r"<(?!a\b)[a-z]+\b[^>]*>", html)
        assert not [x for x in tags if elsewhere.search(x) and 'rel="canonical"' not in x], page
        # what the theme's script would fetch: diagrams, and the numbers of a repository; and what would be TeX
        for word in ('class="mermaid', 'data-md-component="source"', "arithmatex", "MathJax", "katex", "$$"):
            assert word not in html, (page, word)
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"@import|url\([\"\']?(?:https?:)?//", style.read_text("utf-8")), style
