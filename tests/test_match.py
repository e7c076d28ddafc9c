"""Matched radii by what they are matched to, counted and integrated independently."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from truth.bounds import NAMES
from truth.coefficients import g

import bandpo
from bandpo import cli


def tokens(rows=8, columns=50):
    generator = torch.Generator().manual_seed(2)
    old = torch.log_softmax(3 * torch.randn(rows, columns, 6, generator=generator), -1)[..., 0]
    logps = (old + 0.4 * torch.randn(rows, columns, generator=generator)).clamp(max=-1e-4)
    return logps, old, torch.arange(columns) < torch.randint(5, columns, (rows, 1), generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_is_met_to_the_token(name, share):
    logps, old, mask = tokens()
    delta = bandpo.match_delta(share, old, logps, mask, divergence=name)
    assert isinstance(delta, float)
    outside = (~bandpo.in_band(logps, old, delta, name) & mask).sum().item()
    assert outside == round(share * mask.sum().item())
    stats = bandpo.clip_stats(logps, old, torch.ones(8), mask, clip=bandpo.Band(name, delta, cap=None)).metrics()
    assert (stats["outside_below"] + stats["outside_above"]).item() == pytest.approx(outside / mask.sum().item())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [bandpo.Fixed(0.2, 0.28), bandpo.Band("tv", delta=0.1, cap=None)])
def test_a_clip_is_matched_in_reach(name, clip):
    _, old, mask = tokens()
    dirty = torch.where(mask, old, math.nan)
    delta = bandpo.match_delta(clip, dirty, mask=mask, divergence=name)
    p = old.double().exp()[mask]

    def reach(bounds):
        low, high = bounds.low[mask].double(), bounds.high[mask].double()
        return (torch.minimum(p * high, torch.ones_like(p)) - p * low).mean().item()

    assert reach(bandpo.band(old, delta, name)) == pytest.approx(reach(clip.bounds(old)), rel=2e-5)
    if name == "tv" and isinstance(clip, bandpo.Band):
        assert delta == pytest.approx(0.1, rel=1e-5)
    capped = bandpo.match_delta(clip, old, mask=mask, divergence=name, cap=1.5)
    assert capped > delta and reach(bandpo.band(old, capped, name, 1.5)) == pytest.approx(reach(clip.bounds(old)), 2e-5)


def test_kl_and_chi2_radii_differ_by_two_for_small_moves():
    _, old, _ = tokens()
    small = bandpo.Band("kl", delta=1e-5, cap=None)
    usual = old[old > -2]
    assert bandpo.match_delta(small, usual, divergence="chi2") == pytest.approx(2e-5, rel=0.02)


X = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bandpo.match_delta(0.5, X), "needs the new policy's logps"),
        (lambda: bandpo.match_delta(1.5, X, X), "target=1.5"),
        (lambda: bandpo.match_delta("fixed", X, X), "target='fixed'"),
        (lambda: bandpo.match_delta(0.1, X, X), "target=0.1 of 4 tokens is 0"),
        (
            lambda: bandpo.match_delta(0.5, X, X),
            "4 of 4 tokens are tied, and no radius leaves 2 outside, 0 at the nearest",
        ),
        (lambda: bandpo.match_delta(0.5, X, X * math.nan), "holds NaN"),
        (lambda: bandpo.match_delta(0.5, X, X[:2]), "logps has shape (2,)"),
        (lambda: bandpo.match_delta(0.5, X, X, torch.ones(3)), "must be a tensor of the shape of old_logps"),
        (lambda: bandpo.match_delta(0.5, X, X, torch.zeros(4)), "no token where mask is 1"),
        (lambda: bandpo.match_delta(bandpo.NoClip(), X), "give a clip that confines them"),
        (lambda: bandpo.match_delta(bandpo.Fixed(0.0, 0.0), X), "leaves a mean width of 0 in probability"),
        (lambda: bandpo.match_delta(bandpo.Fixed(0.2), X, cap=0.5), "cap=0.5"),
        (lambda: bandpo.match_delta(0.5, X, X, divergence="ch2"), "did you mean 'chi2'"),
    ],
)
def test_no_radius_is_an_error_of_one_line(call, words):
    with pytest.raises(bandpo.InputError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_whose_edge_is_infinite():
    """Where the new policy gives 0, kl is huge and neyman infinite; any radius between does."""
    logps = torch.tensor([-1.0, -1.1, -2.0, -math.inf])
    old = torch.tensor([-1.0, -1.2, -1.5, -1.0])
    for name in ("kl", "neyman"):
        delta = bandpo.match_delta(0.25, old, logps, divergence=name)
        assert math.isfinite(delta) and bandpo.in_band(logps, old, delta, name).tolist() == [True, True, True, False]


def test_ties_stay_together():
    """Completions of one prompt that begin alike: their first tokens have one value."""
    old = torch.full((8,), -1.0)
    logps = old + torch.tensor([0.5, 0.5, 0.5, 0.4, 0.1, 0.1, 0.0, 0.0])
    for share, outside in ((0.3, 3), (0.5, 4), (0.7, 6)):
        assert (~bandpo.in_band(logps, old, bandpo.match_delta(share, old, logps))).sum() == outside


# ---------------------------------------------------------------- the command

LOG = Path(__file__).parent.parent / "examples" / "logs" / "gap.parquet"


def run(capsys, *words):
    code = cli.main(["match", *words])
    return code, *capsys.readouterr()


def test_the_command_gives_the_radius_whose_bound_is_the_clips(capsys):
    points = [0.01, 0.5, 0.7, 0.9]
    words = ["--eps", "0.2", "--eps_high", "0.28", "--p", *map(str, points), "--divergence", "kl", "tv", "chi2"]
    code, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0 and [row["p"] for row in found["rows"]] == points
    for row in found["rows"]:
        p = row["p"]
        assert (row["low"], row["high"]) == (pytest.approx(0.8), pytest.approx(1.28))
        for side, r in (("below", 0.8), ("above", 1.28)):
            for name, radius in row[side].items():
                if r * p >= 1:
                    assert radius is None
                else:
                    assert radius == pytest.approx(g(name, p, r), rel=1e-6), (name, p, r)
    for name, radius in found["mean_width"].items():
        bounds = bandpo.band(torch.tensor(points).log(), radius, name)
        width = sum(p * (min(h, 1 / p) - low) for p, low, h in zip(points, bounds.low, bounds.high, strict=True))
        assert float(width) == pytest.approx(sum(p * (min(1.28, 1 / p) - 0.8) for p in points), rel=1e-4)
    text = run(capsys, *words)[1]
    assert "There is no single answer" in text and text.count("beyond") == 3 + 1
    assert max(map(len, text.splitlines())) <= 110
    corners = {
        "--eps 0.2 --p 1e-12": "-: no radius",
        "--clip none --p 0.1": " none ",
        "--eps 0.2 --p 0.9999999999": "999 ",
    }
    for line, says in corners.items():
        assert says in run(capsys, *line.split())[1]


def test_the_command_matches_on_tokens_what_explain_says(capsys):
    says = {
        "0.2": "without gradient",
        "clip_higher": "without gradient",
        "sapo": "gradient taken",
        "gspo": "nothing matches",
    }
    for words in (["--eps", "0.2"], ["--clip", "clip_higher"], ["--clip", "sapo"], ["--clip", "gspo"]):
        code, out, _ = run(capsys, *words, "--tokens", str(LOG), "--json")
        tokens = json.loads(out)["tokens"]
        clip = ["--clip", "fixed"] if words[0] == "--eps" else words
        assert cli.main(["explain", str(LOG), *clip, "--json"]) == code == 0
        want = json.loads(capsys.readouterr().out)
        assert tokens["equivalent"] == want["equivalent"] and tokens["count"] == want["counts"]["tokens"]
        assert (tokens["mean_width"] is None) == (words[-1] in ("sapo", "gspo"))
        assert says[words[-1]] in run(capsys, *words, "--tokens", str(LOG))[1]


def test_the_command_shows_the_divergences_asked_for(capsys):
    _, text, _ = run(capsys, "--eps", "0.2", "--tokens", "example", "--divergence", "tv", "hellinger")
    assert "Band tv" in text and "PPO eps" in text and "hellinger" in text
    assert not any(x in text for x in ("kl", "chi2", "(--tokens)"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --eps 0.2 or --clip NAME"),
        (["--eps", "0.2", "--clip", "band"], "must be one of both"),
        (["--eps", "-1"], "eps_low=-1"),
        (["--eps_high", "0.3", "--clip", "fixed"], "must come with --eps"),
        (["--eps", "0.2", "--clip_args.delta", "1"], "must come with --clip NAME"),
        (["--eps", "0.2", "--p", "1.5"], "--p 1.5: must be a probability"),
        (["--eps", "0.2", "--p", "nan"], "--p nan: must be a probability"),
        (["--eps", "0.2", "--divergence", "ch2"], "did you mean 'chi2'?"),
        (["--clip", "clip_hgher"], "did you mean 'clip_higher'?"),
        (["--clip", "sapo"], "must be matched on tokens"),
        (["--eps", "0.2", "--tokens", "no.npz"], "no.npz: no such file"),
    ],
)
def test_what_the_command_refuses(capsys, words, says):
    code, out, err = run(capsys, *words)
    assert code == 2 and says in err and err.count("\n") == 1 and out == ""


def test_what_the_tokens_hold_that_cannot_be_is_said(capsys, tmp_path):
    x = np.full((4, 30), -1.0, np.float32)
    x[2, 3] = np.nan
    np.savez(tmp_path / "x.npz", logps=x, old_logps=x - 0.3, advantages=np.ones(4))
    assert cli.main(["match", "--eps", "0.2", "--tokens", str(tmp_path / "x.npz")]) == 0
    assert "logps is NaN or infinite for 1 token, the first at sequence 2, token 3" in capsys.readouterr().out
