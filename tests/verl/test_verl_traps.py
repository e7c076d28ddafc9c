"""verl's own traps, as the guide describes them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_support import actor, make_batch, run
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, compute_grpo_outcome_advantage

from bandpo.engines.verl import LOSS_MODE, BandLossConfig


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_reward_that_is_not_finite_spoils_its_group_and_the_loss(bad: float) -> None:
    batch = make_batch(rows=8)
    rewards = torch.zeros(8, 32, dtype=torch.float64)
    rewards[:, 0] = torch.tensor([1.0, 0.0, bad, 2.0, 1.0, 0.0, 0.0, 1.0])
    groups = np.repeat(["a", "b"], 4)
    advantages, _ = compute_grpo_outcome_advantage(rewards, torch.ones(8, 32), groups)
    assert advantages[:4].isnan().all() and advantages[4:].isfinite().all()
    for clip in ("band", "sapo"):
        loss, gradient, _ = run(LOSS_MODE, actor(BandLossConfig(clip=clip)), batch | {"advantages": advantages})
        assert loss.isnan() and gradient[:4].isnan().any() and gradient[4:].isfinite().all()


def test_external_modules_put_the_loss_in_as_well(tmp_path: Path) -> None:
    """verl imports what VERL_USE_EXTERNAL_MODULES names, in each process that imports verl."""
    (tmp_path / "losses_of_mine.py").write_text("import bandpo.engines.verl\n")
    code = "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; print('bandpo' in r)"
    for modules, found in (("losses_of_mine", "True"), ("", "False")):
        env = os.environ | {"VERL_USE_EXTERNAL_MODULES": modules, "VERL_USE_EXTERNAL_PLUGINS": "none"}
        env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env.get('PYTHONPATH', '')}"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
        assert done.stdout.split()[-1] == found, done.stderr[-1000:]


def test_verl_s_column_of_the_comparison() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text("utf-8")
    (row,) = re.findall(r"^\| clips \|.*$", page, flags=re.M)
    named = re.findall(r"`(\w+)`", row.split(" | ")[3])
    assert named == [name for name in POLICY_LOSS_REGISTRY if name != LOSS_MODE]
    config = actor()
    assert (config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c) == (0.2, 0.2, 3.0)
    assert config.policy_loss.loss_mode == "vanilla" and metadata("verl")["License"] == "Apache-2.0"
    _, _, metrics = run("vanilla", config, make_batch(rows=8))
    assert {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"} <= set(metrics)
