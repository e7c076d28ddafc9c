"""Stale rollouts: made by the policy of K turns ago, with its log-probabilities; resumed bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl_support import make_trainer

from bandpo import InputError
from bandpo.lab.trl.staleness import StaleGRPOTrainer

SCHEDULE = {"num_iterations": 1, "steps_per_generation": 4, "gradient_accumulation_steps": 1, "max_steps": 20}


class Watched(StaleGRPOTrainer):
    """Keeps the policy of each turn, and compares the denominators of every update with the policy that is due."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.policies.append(copy.deepcopy(self.model).eval())
        self.policies[-1].requires_grad_(False)
        return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        due = self.policies[max(0, len(self.policies) - 1 - self.staleness)]
        mask, now = inputs["completion_mask"].bool(), self.policies[-1]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            want, new = (
                GRPOTrainer._get_per_token_logps_and_entropies(self, policy, ids, attention, mask.size(1))[0]
                for policy in (due, now)
            )
        self.errors.append(float((inputs["old_per_token_logps"] - want)[mask].abs().max()))
        self.drift.append(float((want - new)[mask].abs().max()))
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_rollout_is_as_old_as_it_should_be(tmp_path, staleness):
    trainer = make_trainer(tmp_path, Watched, staleness=staleness, **SCHEDULE)
    trainer.policies, trainer.errors, trainer.drift = [], [], []
    trainer.train()
    assert len(trainer.policies) == 5 and len(trainer.errors) == 20 and max(trainer.errors) < 1e-5
    old = [drift > 1e-3 for drift in trainer.drift]
    assert old == [bool(staleness) and i >= 4 for i in range(20)]
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(entries) == 5 and all("clip/zero_grad" in entry for entry in entries)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_run_trains_on_the_rollouts_that_were_waiting(tmp_path):
    options = {"staleness": 2, "save_strategy": "steps", "save_steps": 8, **SCHEDULE}
    whole = make_trainer(tmp_path / "whole", StaleGRPOTrainer, **options)
    whole.train()
    again = make_trainer(tmp_path / "whole", StaleGRPOTrainer, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert losses(whole)[:16] == losses(again)[:16]  # after these come rollouts made since, by TRL's own random state
    other = make_trainer(tmp_path / "other", StaleGRPOTrainer, **options | {"staleness": 1})
    with pytest.raises(InputError, match="holds 2 rollouts, but staleness=1"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    (tmp_path / "whole" / "checkpoint-8" / "rollouts-rank0.pt").unlink()
    with pytest.raises(InputError, match="was not made with staleness=2"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))


@pytest.mark.filterwarnings("ignore:num_iterations=1")
def test_what_cannot_be_stale_is_refused(tmp_path):
    with pytest.raises(InputError, match="TRL keeps no old log-probabilities"):
        make_trainer(tmp_path, StaleGRPOTrainer, staleness=1, **SCHEDULE | {"gradient_accumulation_steps": 4})
