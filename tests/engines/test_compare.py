"""What the page "How it compares" says of bandpo and of TRL is so in what is installed; verl is tested beside verl."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

import bandpo
from bandpo.operator.family import FAMILY

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text("utf-8")


def cells(row: str) -> list[str]:
    """The cells of the row that begins so, after its name."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in re.split(r" (?<!\\)\| ?", line.strip("|"))][1:]


def test_bandpo_s_own_numbers() -> None:
    ours = cells("clips")[0]
    assert f"{len(bandpo.list_clips())} in [one registry]" in ours
    assert len(FAMILY) == 7 and "seven divergences" in cells("bounds that follow from the token's probability")[0]
    for name in ("dppo_tv", "trgppo", "dcpo", "ripo"):
        assert bandpo.get_clip(name).uses_p, name
    band = bandpo.get_clip("band")
    assert (band.delta, band.cap) == (0.05, None) and "radius .05, no ceiling" in cells("defaults")[0]
    assert metadata("bandpo")["License-Expression"] == "Apache-2.0"


def test_trl_s_column() -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'bandpo[trl]'")
    from trl.trainer.grpo_trainer import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._compute_loss)
    for name in re.findall(r"`(\w+)`", cells("clips")[1].partition("; ratio")[0]):
        assert f'"{name}"' in source, name
    fields = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    assert fields["delta"] is None and fields["importance_sampling_level"] == "token"
    assert (fields["epsilon"], fields["epsilon_high"]) == (0.2, None) and ".2 and .2" in cells("defaults")[1]
    assert (
        fields["num_iterations"] == 1 and fields["steps_per_generation"] is None
    )  # that of gradient_accumulation_steps
    assert not any("divergence" in name or "dppo" in name for name in fields)
    assert "torch.clamp(coef_1, max=self.epsilon_high)" in source  # cispo: the ceiling itself
    logged = set(re.findall(r'"(clip_ratio/\w+|cispo_clip_ratio)"', source))
    assert {"clip_ratio/low_mean", "clip_ratio/high_max", "clip_ratio/low_min", "cispo_clip_ratio"} <= logged
    told = source[source.index('"clip_ratio/low_mean"') - 2500 : source.index('"cispo_clip_ratio"')]
    assert '"sapo"' not in told and '"vespo"' not in told
    assert trl.GRPOConfig("unused", report_to="none", use_cpu=True, bf16=False).logging_nan_inf_filter
    assert metadata("trl")["License-Expression"] == "Apache-2.0"


def test_links_of_the_page_exist() -> None:
    docs = Path(__file__).parents[2] / "docs"
    for target in re.findall(r"\]\(([\w-]+\.md)", PAGE):
        assert (docs / target).exists(), target
