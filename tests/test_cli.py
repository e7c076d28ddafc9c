"""The command line: numbers against the operator's definition, exit codes, and one line for every wrong input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import make_run

from bandpo import cli, doctor
from bandpo.cli import main
from bandpo.engines._hosts import HOSTS, Host


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_bounds_solve_the_equation(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bounds", "--p", "0.01", "0.08", "0.9", "--delta", "0.02", "--json")
    found = json.loads(out)
    assert code == 0 and (found["delta"], found["divergence"], found["cap"]) == (0.02, "kl", None)
    for row in found["rows"]:
        for side in ("low", "high"):
            p, r = row["p"], row[side]
            g = -p * math.log(r) - (1 - p) * math.log((1 - r * p) / (1 - p))
            assert g == pytest.approx(0.02, rel=1e-9)
            assert row[f"p_{side}"] == pytest.approx(p * r, rel=1e-12)
        assert row["clip_higher"]["p_high"] == pytest.approx(min(1.0, 1.28 * row["p"]))


def test_bounds_cap_and_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "bounds", "--p", "0.001", "--divergence", "tv", "--cap", "10", "--json")
    assert json.loads(out)["rows"][0]["high"] == pytest.approx(10.0)
    _, out, _ = run(capsys, "bounds", "--p", "0.001", "0.5", "--divergence", "tv", "--delta", "0.05")
    assert [line.split() for line in out.splitlines()[4:]] == [
        ["0.001", "0", "51", "0", "0.051", "0.0008", "0.00128"],
        ["0.5", "0.9", "1.1", "0.45", "0.55", "0.4", "0.64"],
    ]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_bounds_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"b.{suffix}"
    code, out, _ = run(capsys, "bounds", "--p", "0.08", "--plot", str(path))
    assert code == 0 and f"drawn: {path}" in out and path.stat().st_size > 10_000


def test_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "bounds", "--p", "0.08", "--plot", str(tmp_path / "b.svg"))
    assert code == 2 and "pip install matplotlib" in err and err.count("\n") == 1


WRONG = [
    ("bunds", "did you mean 'bounds'?"),
    ("train demo --seeds 0 1 --smoke", "--smoke with --seeds"),
    ("", "no command given"),
    ("--hlep", "did you mean '--help'?"),
    ("bounds", "required: --p"),
    ("bounds --p 0", "--p 0: must be a probability"),
    ("bounds --p 1.5", "--p 1.5: must be a probability"),
    ("bounds --p nan", "--p nan: must be a probability"),
    ("bounds --p x", "invalid float value: 'x'"),
    ("bounds --p 0.1 --detla 3", "did you mean '--delta'?"),
    ("bounds --p 0.1 --delta 0", "delta=0.0"),
    ("bounds --p 0.1 --delta nan", "delta=nan"),
    ("bounds --p 0.1 --cap 0.5", "cap=0.5"),
    ("bounds --p 0.1 --divergence kll", "did you mean 'kl'?"),
    ("bounds --p 0.1 --plot x.docx", "'docx'"),
    ("bounds --p 0.1 --plot no/such/folder/x.svg", "cannot be written"),
    ("report --out x.html", "required: DIR"),
    ("report no-such-run --out x.html", "no-such-run: there is no such folder"),
    (f"report {'x' * 300} --out x.html", "there is no such folder"),
    ("doctor extra", "extra: bandpo doctor does not take it"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words.split())
    assert (code, out) == (2, "") and said in err and err.startswith("bandpo: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_interruption_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.bounds, "_bounds", stop)
    assert run(capsys, "bounds", "--p", "0.1") == (1, "", "bandpo: interrupted\n")


def test_report_takes_the_arms_along(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_run(tmp_path / "a", rollouts=2)
    make_run(tmp_path / "a" / "arms" / "none", "none", rollouts=2)
    page = tmp_path / "r.html"
    code, out, _ = run(capsys, "report", str(tmp_path / "a"), "--out", str(page), "--json")
    assert code == 0 and json.loads(out) == {"report": str(page), "runs": [f"{tmp_path}/a", f"{tmp_path}/a/arms/none"]}
    assert "The runs side by side" in page.read_text()


def test_train_gets_the_keys_that_no_option_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    args = cli._parse(["train", "demo", "--clip_args.delta", "0.02", "--out", "x", "--seed=3"])
    assert args.recipe == "demo" and args.overrides == ["--clip_args.delta", "0.02", "--seed=3"]


@pytest.mark.parametrize("command", ["", "bounds", "train", "verl", "report", "doctor"])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "example" in out and f"  bandpo {command}" in out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["packages"]["torch"] and found["device"]["kind"] in ("cpu", "cuda", "mps")
    fits = {e["name"]: (e["fits"], e["note"]) for e in found["engines"]}
    assert list(fits) == [host.package for host in HOSTS.values()] and fits["trl"] == fits["torchrl"] == fits[
        "ray"
    ] == (True, "")
    assert fits["slime"] == (None, HOSTS["slime"].way) and "pip install" in HOSTS["slime"].way
    assert "engine trl" in doctor.as_text(found) and "the hook fits" in doctor.as_text(found)


def test_doctor_without_and_with_a_wrong_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "HOSTS", {"no_such": Host("no-such-engine", "", "look for it")})
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "engine no-such-engine, not installed: look for it" in out
    monkeypatch.setattr(doctor, "HOSTS", {"no_such": Host("torch", "", "")})
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "DOES NOT FIT: No module named 'bandpo.engines.no_such'" in out


def test_the_command_starts_light() -> None:
    code = "import sys, bandpo.cli; print({'trl', 'transformers', 'matplotlib', 'yaml', 'rich'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
