"""The cards are what the code makes today, their recipes load, and the numbers on them are true."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import bandpo
from bandpo import InputError, cli
from bandpo.lab.cards import about
from bandpo.lab.cards.about import _facts
from bandpo.lab.cards.numbers import numbers
from bandpo.lab.cards.text import in_trl
from bandpo.lab.cards.write import write_texts
from bandpo.lab.recipe import load
from bandpo.lab.trl.config import to_trl
from bandpo.plots.surface import RARE

DOCS = Path(__file__).parent.parent / "docs"
NAMES = bandpo.list_clips()
RENEW = "run `python -m bandpo.lab.cards docs --pictures`"


def card(name: str) -> str:
    return (DOCS / "clips" / f"{name}.md").read_text("utf-8")


def test_every_card_and_table_is_what_the_code_writes(tmp_path: Path) -> None:
    for part in ("clips.md", "which-clip.md", "explorer.html", "data"):
        (shutil.copytree if part == "data" else shutil.copy)(DOCS / part, tmp_path / part)
    written = write_texts(tmp_path)
    old = [p.name for p in written if (DOCS / p.relative_to(tmp_path)).read_text("utf-8") != p.read_text("utf-8")]
    assert not old, f"out of date: {', '.join(old)}; {RENEW}"
    assert {p.stem for p in (DOCS / "clips").glob("*.md")} == set(NAMES), "a card without a clip, or a clip without one"


def test_a_page_without_its_marks_is_refused_and_not_cut(tmp_path: Path) -> None:
    from bandpo.lab.cards.write import _fill

    page = tmp_path / "page.md"
    for text in ("no marks\n", "<!-- x -->\nbelow\n", "above\n<!-- x --><!-- end of x -->\nbelow\n"):
        page.write_text(text)
        if "end" in text:
            for _ in range(2):
                _fill(page, "x", lambda: "made")
            assert page.read_text() == "above\n<!-- x -->\n\nmade\n\n<!-- end of x -->\nbelow\n"
        else:
            with pytest.raises(InputError, match="must have the marks"):
                _fill(page, "x", lambda: "made")
            assert page.read_text() == text


def test_every_clip_has_its_facts_and_every_default_a_source() -> None:
    assert set(_facts()) == set(NAMES)
    kinds = {"region", "gate", "mask", "weight", "penalty"}
    for name in NAMES:
        it = about(name)
        assert it.kind in kinds and it.formula and it.summary and it.said("bounds") and it.said("idle"), name
        for argument in it.arguments:
            assert argument.text, f"{name}: {argument.name} is not described"
            assert argument.source or argument.name == "region", f"{name}: {argument.name} has no source in facts.toml"
        assert set(it.facts.get("values", {})) <= {a.name for a in it.arguments}, f"{name}: a value of no argument"
        assert all(re.match("https://", where) for _, where in it.facts.get("links", ())), name


@pytest.mark.parametrize("name", [n for n in NAMES if in_trl(about(n))])
def test_the_recipe_on_the_card_is_one(name: str, tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", card(name), flags=re.M | re.S)
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    recipe = load(str(file))
    to_trl(recipe, str(tmp_path / "out"))
    defaults = {a.name: a.default for a in about(name).arguments if a.name in recipe.clip_args or a.name != "region"}
    assert recipe.clip == name and recipe.clip_args == defaults and bandpo.get_clip(name, **recipe.clip_args)
    said = f"bandpo train {name}.yaml --out runs/{name}"
    assert f"`{said}`" in card(name) and cli._parse(said.split()[1:]).handler
    bare = [x for x in text.splitlines() if "#" not in x and not x.startswith("clip")]
    assert all(x.strip().startswith("region:") for x in bare), f"a value without its source: {bare}"


def test_the_recipe_on_the_clips_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "clips.md").read_text("utf-8"), flags=re.M | re.S)
    (tmp_path / "a.yaml").write_text("task: addition\nmodel: bandpo/tiny-addition\nuse_cpu: true\n" + text)
    recipe = load(str(tmp_path / "a.yaml"))
    assert bandpo.get_clip(recipe.clip, **recipe.clip_args) == bandpo.get_clip("sides")


@pytest.mark.parametrize("name", [n for n in NAMES if not in_trl(about(n))])
def test_the_call_on_a_card_without_a_recipe_works(name: str) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", card(name), flags=re.M | re.S)
    ones = torch.ones(2, 3)
    given = {"logps": -1.1 * ones, "old_logps": -ones, "advantages": ones[:, 0], "mask": ones}
    names = given | {"rewards": ones[:, 0], "state_divergence": 0.01 * ones, "entropies": ones}
    exec(compile(code, f"{name}.md", "exec"), names)
    assert names["shaped"].shape == (2, 3) and bool(names["shaped"].isfinite().all())


def binary_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def reach(name: str, which: int = 0) -> tuple[list[float | None], list[float | None]]:
    return numbers(bandpo.get_clip(name))[which].reach


def test_how_far_a_token_may_go_is_what_the_formula_says() -> None:
    up, down = reach("clip_higher")
    assert up == pytest.approx([1.28, 1.28, 1.28, 1.28, None]) and down == pytest.approx([0.8] * 5)
    up, down = reach("dppo_tv")
    assert up == pytest.approx([1 + 0.15 / p for p in RARE[:4]] + [None])
    assert down == pytest.approx([None] * 3 + [1 - 0.15 / p for p in RARE[3:]])
    for name, delta in (("band", 0.05), ("trgppo", 0.001), ("dppo_kl", 0.05)):
        for side in reach(name):
            for p, r in zip(RARE, side, strict=True):
                assert r is None or binary_kl(p, r * p) == pytest.approx(delta, rel=1e-6), (name, p)
    (up, down), (alike, _) = reach("gspo"), reach("gspo", 1)
    assert up[0] == pytest.approx(1.0004**1000) and down[0] == pytest.approx(0.9997**1000)
    assert alike[0] == pytest.approx(1.0004)
    assert reach("spo") == (pytest.approx([1.2] * 4 + [None]), pytest.approx([0.8] * 5))
    for name in ("none", "cispo", "sapo", "maspo", "vespo", "pg_is"):
        assert {r for one in numbers(bandpo.get_clip(name)) for side in one.reach for r in side} == {None}, name


def test_what_is_left_of_the_gradient_is_what_the_formula_says() -> None:
    (one,) = numbers(bandpo.get_clip("up_grpo"))  # rows of r = .5, 2, 5
    assert one.kept[0][0] == [1, 1, 1] and one.kept[1][0] == [0, 2, 0]
    assert one.facts[0].zero_above == one.facts[0].zero_below == 0
    (none,) = numbers(bandpo.get_clip("none"))
    assert none.facts[0].same and none.facts[1].same
    (spo,) = numbers(bandpo.get_clip("spo"))
    want = [r * (1 - (r - 1) / 0.2) for r in (0.5, 2, 5)]
    assert spo.kept[0][0] == pytest.approx(want) and want[2] == pytest.approx(-95)
    (fixed,) = numbers(bandpo.get_clip("fixed"))  # the zeros of A < 0, as a share of log r from -log 20 to 0
    assert fixed.facts[1].zero_below == pytest.approx(1 + math.log(0.8) / math.log(20), abs=0.02)


def test_with_one_update_a_rollout_every_clip_but_one_is_idle() -> None:
    logps = torch.tensor([[-0.1, -1.0, -3.0, -7.0], [-0.5, -2.0, -4.0, -9.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.3], [-0.7]], dtype=torch.float64).expand_as(logps)
    tokens = bandpo.Tokens(
        logps,
        logps,
        advantages,
        rollout_logps=logps,
        entropies=torch.ones_like(logps),
        rewards=torch.ones_like(logps),
        state_divergence=torch.zeros_like(logps),
    )
    acts = [n for n in NAMES if not torch.allclose(bandpo.get_clip(n).coefficient(tokens), advantages, rtol=1e-12)]
    assert acts == ["clip_cov"], "which-clip.md says so"


def test_the_numbers_in_the_facts_are_true() -> None:
    assert 1 - math.exp(-0.05) == pytest.approx(0.0488, abs=5e-5)  # band: q of a rare token
    log_p = torch.linspace(-8, -1e-3, 200_001, dtype=torch.float64)
    band, p = bandpo.band(log_p, 0.05), log_p.exp()
    assert p[band.high > 1.28].max().item() == pytest.approx(0.540, abs=1e-3)
    assert p[band.low < 0.8].max().item() == pytest.approx(0.751, abs=1e-3)
    assert p[band.high > 10].max().item() == pytest.approx(0.0071, abs=1e-4)
    dcpo = bandpo.get_clip("dcpo", cap=1e9).bounds(log_p)
    assert p[dcpo.high > 10].max().item() == pytest.approx(0.0031, abs=1e-4)
    assert 1.0004**1000 == pytest.approx(1.49, abs=5e-3)  # gspo: one of 1000 tokens
    assert math.sqrt(0.04) == pytest.approx(0.2) and math.exp(0.2) - 1 == pytest.approx(0.22, abs=2e-3)  # m2po
    assert math.exp(0.4) - 1 == pytest.approx(0.49, abs=3e-3) and 1 - math.exp(-0.4) == pytest.approx(0.33, abs=1e-3)
    atr = bandpo.get_clip("atr").bounds(log_p[:1])
    assert [atr.low.item(), atr.high.item()] == pytest.approx([0.716, 1.350], abs=1e-3)
    assert 0.001**-0.3 == pytest.approx(7.9, abs=0.05)  # maspo's width
    assert 9 * math.exp(3 * -2) == pytest.approx(0.022, abs=1e-3)  # vespo at W = 3
    assert 1 / 1.2 == pytest.approx(0.83, abs=5e-3)  # which-clip.md, 8
    at = bandpo.band(torch.tensor([0.01], dtype=torch.float64).log(), 0.05)
    assert 0.01 * at.high.item() == pytest.approx(0.078, abs=5e-4)  # which-clip.md, the table


def test_the_command_prints_the_registry_and_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clips"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1 : len(NAMES) + 1]] == NAMES
    assert cli.main(["clips", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["clips"]
    assert [row["name"] for row in rows] == NAMES and rows[NAMES.index("band")]["uses_p"]
    assert cli.main(["clips", "clip-higher"]) == 0
    assert "c / A, A > 0" in (said := capsys.readouterr().out) and "DAPO, 2503.14476" in said
    assert cli.main(["clips", "ipo"]) == 0 and cli.main(["clips", "ipo@2026-03"]) == 0
    half = len(said := capsys.readouterr().out) // 2
    assert said[:half] == said[half:]
    assert cli.main(["clips", "clip_higher", "--json"]) == 0
    (piece,) = json.loads(capsys.readouterr().out)["slices"]
    assert piece["A>0"]["reach"][0] == pytest.approx(1.28) and piece["A>0"]["kept"][4][1] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clip_highr"], "clip_higher"),
        (["band", "--plot", "a.doc"], "use .svg, .png or .pdf"),
        (["band", "--plot", "no/such/folder/a.svg"], "give a folder that exists"),
        (["band", "--plot", "a"], "use .svg, .png or .pdf"),
    ],
)
def test_the_command_refuses_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clips", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_others_measured_has_a_source_and_seeds_in_every_row() -> None:
    with (DOCS / "data" / "others.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    page = (DOCS / "which-clip.md").read_text("utf-8")
    assert len(rows) >= 10
    for row in rows:
        assert list(row) == ["compared", "model", "task", "seeds", "result", "source", "url", "date"]
        assert all(value and "|" not in value for value in row.values()), row
        assert row["url"].startswith("https://") and re.fullmatch(r"20\d\d-\d\d", row["date"]), row
        assert f"| {row['result']} | [{row['source']}]({row['url']})" in page
