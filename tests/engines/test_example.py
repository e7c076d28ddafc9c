"""The RLHF example in short form: a reward model learns the judge's taste, and the model from the reward model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "rlhf_trl.py"


def test_rlhf_learns_what_the_judge_likes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'bandpo[train]'")
    result = runpy.run_path(str(EXAMPLE))["main"](["--reward-steps", "40", "--steps", "24"])
    assert result["right"] > 0.7
    assert result["reward_after"] > result["reward_before"]
    assert result["even_after"] > result["even_before"] + 0.4  # about 0.8 more digits of 4; noise is about 0.1
    assert result["clipped"] > 0
    assert "learned reward: " in capsys.readouterr().out
