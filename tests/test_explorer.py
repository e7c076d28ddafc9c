"""The explorer of the docs, in headless Chromium: its numbers are the library's, and a link restores what was set."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bandpo
from bandpo.lab.cards.explorer import RANGES, accepts, explorable, results
from bandpo.plots import surface

PAGE = Path(__file__).parent.parent / "docs" / "explorer.html"
ROWS = re.findall(r"^  (\w+): \{(?:region|c):", PAGE.read_text("utf-8"), flags=re.MULTILINE)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
)
# beside the defaults: arguments of every clip that has some, none of them those that the page checks itself by
ARGUMENTS: dict[str, dict[str, Any]] = {
    "fixed": {"eps_low": 0.4, "eps_high": 0.1},
    "dual_clip": {"eps_high": 0.6, "cap": 1.7},
    "dppo_tv": {"delta": 0.05, "cap": None},
    "dppo_kl": {"delta": 0.2, "cap": 1.5},
    "cispo": {"eps_low": 0.6, "eps_high": 0.9},
    "sapo": {"tau_pos": 3.0, "tau_neg": 0.4},
    "dgpo": {"n": 0.7, "m": 3.0, "eps_high": 0.4},
    "trgppo": {"delta": 0.02},
    "dcpo": {"eps_low": 0.05, "eps_high": 0.7, "cap": None},
    "atr": {"delta": 0.3},
    "ripo": {"delta": 0.1, "floor": 0.1, "cap": None},
    "capped": {"cap": 1.4},
    "ipo": {"eps": 0.08},
    "icepop": {"floor": 0.5, "cap": 2.0},
    "tr_ppo": {"delta": 0.1},
    "maspo": {"sigma": 0.5, "alpha": 0.8, "beta": 0.5},
    "ce_gppo": {"beta_low": 0.3, "beta_high": 0.6, "cap": 2.0},
    "aspo": {"cap": 1.5, "eps_low": 0.5},
    "drpo": {"eps": 0.2},
    "spo": {"eps": 0.7},
    "truly_ppo": {"delta": 0.01, "slope": 2.0},
    "pg_is": {"alpha": 0.4},
    "dro": {"beta": 0.8},
    "up_grpo": {"eps_low": 0.6, "cap": 1.5},
}


def opened(tmp_path: Path, script: str = "", hash_: str = "") -> str:
    """The page as it stands after its own script and one of ours, with the network out of reach."""
    page = tmp_path / "explorer.html"
    note = "<script>window.addEventListener('error', (e) => { document.body.dataset.error = e.message; });</script>"
    text = PAGE.read_text("utf-8").replace("<head>", f"<head>{note}", 1)
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    assert CHROMIUM
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{page}{hash_}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    dom = done.stdout
    assert 'data-worst="' in dom, done.stderr[-2000:]
    assert "data-error" not in dom, re.search(r'data-error="([^"]*)"', dom)
    return dom


def asked(tmp_path: Path, question: str) -> Any:
    """What a JavaScript expression is on the page."""
    dom = opened(tmp_path, f"document.body.dataset.answer = JSON.stringify({question});")
    found = re.search(r'data-answer="([^"]*)"', dom)
    assert found
    return json.loads(html.unescape(found[1]))


def text(dom: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", dom.split("<body", 1)[1])).split())


@needs_browser
def test_its_numbers_are_the_librarys(tmp_path: Path) -> None:
    rng, wanted = np.random.default_rng(13), []
    divergences = [{"divergence": name, "delta": 0.02} for name in bandpo.operator.family.FAMILY]
    for name in ROWS:
        own = divergences if name == "band" else [ARGUMENTS[name]] if name in ARGUMENTS else []
        for args in [{}, *own]:
            p = np.exp(rng.uniform(math.log(1e-4), 0, 16)).clip(1e-4, 0.99)
            r = np.exp(rng.uniform(np.log(0.05), np.minimum(math.log(20), -np.log(p) - 1e-3)))
            signs = [1.0, -1.0] * 8
            p, r = np.append(p, [0.3, 0.9, 0.999]), np.append(r, [1 / 0.3, 1 / 0.9, 1 / 0.999])  # and where q = 1
            points = results(bandpo.get_clip(name, **args), p.tolist(), r.tolist(), [*signs, 1.0, 1.0, 1.0])
            wanted += [(name, args, point) for point in points]
    assert len(wanted) >= 900
    given = json.dumps([[name, args, *point[:3]] for name, args, point in wanted])
    call = "explorer.evaluate(clip, {...known[clip].defaults, ...args}, p, r, s)"
    question = f"{given}.map(([clip, args, p, r, s]) => {call})"
    for (name, args, point), got in zip(wanted, asked(tmp_path, question), strict=True):
        c, low, high = point[3:]
        assert got["c"] == pytest.approx(c, rel=1e-5, abs=1e-5), (name, args, point)
        assert (got["low"] is None) == (low is None), name
        if low is not None:
            assert got["low"] == pytest.approx(low, rel=1e-5, abs=1e-5), (name, args, point)
            assert high == "inf" if got["high"] is None else got["high"] == pytest.approx(high, rel=1e-5), (name, point)


@needs_browser
def test_where_the_gradient_ends_is_where_it_does(tmp_path: Path) -> None:
    asks = [(name, p, s) for name in ROWS for p in (0.002, 0.3) for s in (1, -1)]
    question = f"{json.dumps(asks)}.map(([clip, p, s]) => explorer.edge(clip, known[clip].defaults, p, s))"
    for (name, p, s), got in zip(asks, asked(tmp_path, question), strict=True):
        clip = bandpo.get_clip(name)
        (want,) = surface.reach(clip, surface.slices(clip)[0], s, [p])
        assert got == (None if want is None else pytest.approx(want, rel=1e-5)), (name, p, s)


@needs_browser
def test_a_link_restores_what_was_set_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    dom = opened(
        tmp_path, "document.body.dataset.link = link();", "#p=0.3&r=1.8&s=-1&a=dual-clip&a.cap=1.5&b=spo&b.eps=0.5"
    )
    assert "It was 0.3 likely and is 0.54 now, +0.24." in text(dom)
    assert "r = 1.8 > cap = 1.5 and A < 0: 0" in text(dom) and "1.8 (1 + (1.8 − 1) / 0.5) = 4.68" in text(dom)
    (again,) = re.findall(r'data-link="([^"]*)"', dom)
    assert html.unescape(again) == "#p=0.3&r=1.8&s=-1&a=dual_clip&a.cap=1.5&b=spo&b.eps=0.5"
    dom = opened(tmp_path, "", "#p=7&a=bnad&b=band&b.delta=x&b.divergence=no&r=5")
    for said in ("p = 7: must be from 0.0001 to 0.999", "no clip bnad here", "b.delta = x", "no divergence no here"):
        assert said in text(dom), said
    assert "clip_higher, region" in text(dom) and "kl(p, q)" in text(dom)


@needs_browser
def test_whatever_a_link_has_that_cannot_be_is_said(tmp_path: Path) -> None:
    said = {
        "s=7": "s = 7: must be 1 or -1",
        "a=fixed&a.delta=0.5": "delta = 0.5: fixed has no argument delta",
        "a=dcpo&a.eps_high=1.2": "a.eps_high = 1.2: must be from 0 to 1",
        "a=ce_gppo&a.cap=1": "a.cap = 1: must be from 1.001 to 100",
        "a=cispo&a.eps_low= ": "a.eps_low =  : must be from 0 to 1",
        "x=1": "x: no such setting here",
        "p=0.1&p=0.2": "p: given twice, the first counts",
        "p=0.123456&r=1.98765": "",
    }
    for name in ("__proto__", "constructor", "toString"):
        said[f"a={name}"] = f"no clip {name} here"
        said[f"b=band&b.divergence={name}"] = f"no divergence {name} here"
        said[f"a=fixed&a.{name}=1"] = f"{name} = 1: fixed has no argument {name}"
    question = f'{json.dumps(list(said))}.map((x) => {{ start(x); return [byId("wrong").textContent, link()]; }})'
    answers = asked(tmp_path, question)
    assert [wrong for wrong, _ in answers] == list(said.values())
    assert answers[list(said).index("p=0.123456&r=1.98765")][1].startswith("#p=0.123456&r=1.98765&")


@needs_browser
def test_the_words_fit_the_clip(tmp_path: Path) -> None:
    said = {
        "a=truly_ppo&p=0.9&r=5": ("c / A -7.206e16", "1 − q counts as 6.939e-18", "ends outward at r = 1.064"),
        "a=truly_ppo&p=0.999&r=5": (
            "c / A -7.206e14",
            "0.967 to 1.001 region of q 0.966 to 1 ends outward at r = 1.001",
        ),
        "a=band&a.divergence=tv&p=0.97&r=5": ("the upper bound cannot bind", "ends outward never"),
        "a=maspo&a.sigma=0.1&p=0.1&r=2": ("ends outward never",),  # fades too far for a float, and does not end
        "a=band&a.cap=3&p=0.01&r=5&s=-1": ("r = 5 is above 3 = cap, but A pushes it back: 5",),
        "a=up_grpo&p=0.01&r=5&s=-1": ("in numbers r = 5 > cap = 3 and A < 0: 0",),
        "a=aspo&p=0.01&r=5&s=-1": ("but A pushes it back: at most cap = 3: 3",),
        "a=trgppo&p=0.0001&s=-1": ("region of r 0.0000167 to", "ends outward at r = 0.0000167"),
        "a=band&a.divergence=chi2&a.delta=0.0001&p=0.0001&s=-1": ("ends outward at r = 0.00005",),
        "a=dro&s=-1": ("ends outward at r = 0.0000454",),
        "a=none&s=-1": ("ends outward never, down to r = 1e-300",),
    }
    words = '[...byId("a-said").querySelectorAll("dt, dd")].map((x) => x.textContent).join(" ")'
    answers = asked(tmp_path, f"{json.dumps(list(said))}.map((x) => {{ start(x); return {words}; }})")
    for (link, wanted), got in zip(said.items(), answers, strict=True):
        assert not [x for x in wanted if x not in got], (link, got)
        assert "not a number" not in got, link


@needs_browser
def test_controls_act_and_have_names(tmp_path: Path) -> None:
    script = """
      const set = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
      set("p-number", 0.2); set("r-number", 0.5); document.getElementsByName("s")[1].click();
      byId("b-clip").value = "dppo_tv"; byId("b-clip").dispatchEvent(new Event("change"));
      set("b-delta-number", 0.05); set("b-cap-number", "");
      const kept = byId("b-said").textContent; set("b-delta-number", -3);
      document.body.dataset.answer = JSON.stringify({
        kept, after: byId("b-said").textContent, wrong: byId("wrong").textContent, link: link(),
        nameless: [...document.querySelectorAll("input, select, button")].filter((x) =>
          !(x.labels?.length || x.ariaLabel || x.textContent.trim())).map((x) => x.outerHTML),
        skipped: document.querySelectorAll("[tabindex]").length,
      });"""
    found = re.search(r'data-answer="([^"]*)"', opened(tmp_path, script))
    assert found
    got = json.loads(html.unescape(found[1]))
    assert "tv(p, q) = 0.1, delta = 0.05; r = 0.5 is below 0.75, and A pushes it further out: 0" in got["kept"]
    assert got["after"] == got["kept"] and "delta: from 0.0001 to 2" in got["wrong"]
    assert got["link"] == "#p=0.2&r=0.5&s=-1&a=clip_higher&b=dppo_tv&b.delta=0.05&b.cap=none"
    assert not got["nameless"] and not got["skipped"]


@needs_browser
def test_what_was_wrong_is_right_again_after_any_change(tmp_path: Path) -> None:
    script = """
      const fire = (id, x, event = "input") => { byId(id).value = x; byId(id).dispatchEvent(new Event(event)); };
      const wrong = () => [byId("wrong").textContent, document.querySelectorAll("[aria-invalid=true]").length];
      const seen = [];
      for (const right of [() => byId("reset").click(), () => fire("p", -1), () => fire("b-clip", "spo", "change")]) {
        start("b=band"); byId("p-number").focus();
        fire("p-number", 7); fire("b-delta-number", -3); seen.push(wrong());
        right(); seen.push([...wrong(), byId("p-number").value]);
      }
      start("a=dual_clip"); fire("a-cap", 0); seen.push(state.a.args.cap);
      document.body.dataset.answer = JSON.stringify(seen);"""
    found = re.search(r'data-answer="([^"]*)"', opened(tmp_path, script))
    assert found
    bad = ["delta: from 0.0001 to 2", 2]
    assert json.loads(html.unescape(found[1])) == [
        bad,
        ["", 0, "0.01"],
        bad,
        ["", 0, "0.1"],
        bad,
        ["", 0, "0.01"],
        1.001,
    ]


def test_its_limits_are_the_librarys() -> None:
    inside = json.loads(PAGE.read_text("utf-8").split('id="truths">')[1].split("</script>")[0])
    for row in inside["clips"]:
        name, limits = row["name"], row["limits"]
        numbers = [key for key in row["defaults"] if key != "divergence"]
        assert list(limits) == numbers or name not in ROWS, f"{name}: an argument has no range in RANGES"
        for key, (least, most) in limits.items():
            assert accepts(name, key, least) and accepts(name, key, most), (name, key)
            assert least == RANGES[key][0] or not accepts(name, key, least - 0.001), (name, key)
            assert most == RANGES[key][1] or not accepts(name, key, most + 0.001), (name, key)


@needs_browser
def test_it_checks_itself_when_it_opens(tmp_path: Path) -> None:
    found = re.search(r'data-worst="([^"]*)" data-count="(\d+)"', opened(tmp_path))
    assert found and float(found[1]) < 1e-6 and int(found[2]) >= 500


def test_it_needs_no_network_and_knows_clips_of_tokens_alone() -> None:
    page = PAGE.read_text("utf-8")
    assert not re.search(r'(src|href)="(https?:)?//|@import|fetch\(|XMLHttpRequest|import\(', page)
    assert PAGE.stat().st_size < 80_000
    inside = json.loads(page.split('id="truths">')[1].split("</script>")[0])
    assert [clip["name"] for clip in inside["clips"]] == explorable()
    assert len(ROWS) >= 30 and set(ROWS) <= set(explorable())
    for link in re.findall(r'href="([^"$#:]*\.html)"', page):
        assert (PAGE.parent / link.replace(".html", ".md")).is_file(), link


def test_results_are_what_the_clip_gives() -> None:
    ((p, r, sign, c, low, high),) = results(bandpo.get_clip("dppo_tv"), [0.2], [1.5], [1.0])
    assert (p, r, sign, c, low) == (0.2, 1.5, 1.0, 1.5, pytest.approx(0.25)) and high == pytest.approx(1.75)
    assert results(bandpo.get_clip("cispo"), [0.2], [4.0], [-1.0]) == [
        [0.2, 4.0, -1.0, pytest.approx(1.28), None, None]
    ]
    assert results(bandpo.get_clip("none"), [0.2], [4.0], [-1.0])[0][5] == "inf"
