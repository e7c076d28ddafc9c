"""The blocks of the pages about engines run, where the engine is installed; the others are marked READ, with a date."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import yaml

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text("utf-8") for name in ("engines", "snippets")}
BLOCK = re.compile(r"(?:<!-- (read|run): ?(\w*) -->|<!-- (read) -->)?\n?^```(\w+)\n(.*?)^```$", re.M | re.S)
BLOCKS = [(page, m) for page, text in PAGES.items() for m in BLOCK.finditer(text)]
RUN = [pytest.param(m[4], m[5], m[2], id=f"{page}-{m[2]}-{m[4]}") for page, m in BLOCKS if m[1] == "run"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines: a block runs as a user runs it


def test_every_block_is_marked_and_every_read_one_is_dated() -> None:
    for page, m in BLOCKS:
        section = PAGES[page][: m.start()].rpartition("\n## ")[2]
        assert m[1] == "run" or m[3] == "read" or m[4] == "bash", m[5]
        if m[3] == "read":
            assert re.search(r"READ\*?\*?,.*\b202\d-\d\d\b", section, re.S), section[:40]
    assert len(RUN) >= 7


class LocalClient:
    """tinker's TrainingClient, whose forward pass gives back the sampler's log-probabilities, a little moved."""

    def forward_backward_custom(self, data: list[Any], loss: Any) -> Any:
        import tinker
        from tinker.types import ForwardBackwardOutput

        new = [d.loss_fn_inputs["logprobs"].to_torch() * 0.7 for d in data]
        outputs = [{"logprobs": tinker.TensorData.from_torch(x)} for x in new]
        forward = ForwardBackwardOutput(loss_fn_output_type="x", loss_fn_outputs=outputs, metrics={})
        self.metrics = tinker.TrainingClient._compute_custom_loss(data, loss, forward).metrics
        return self

    def result(self) -> Any:
        return self


@pytest.mark.parametrize(("language", "text", "engine"), RUN)
def test_block_runs(language: str, text: str, engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if engine in ("prime_rl", "slime"):  # their settings, up to the call of the loss
        cases.CASES[engine]()
        settings = tomllib.loads(text)["trainer"]["loss"] if language == "toml" else {"kwargs": yaml.safe_load(text)}
        module, _, name = settings.get("import_path", "bandpo.engines.slime.band_loss").rpartition(".")
        function = getattr(importlib.import_module(module), name)
        if language == "toml":
            from prime_rl.trainer.rl.loss import LossInputs

            old, mask = torch.tensor([-1.0, -2.0]), torch.tensor([True, True])
            out = function(LossInputs(old + 0.3, old, None, torch.ones(2), mask), **settings["kwargs"])
            assert torch.isfinite(out.loss)
        assert settings["kwargs"]["clip"] == "band"
        return
    cases.needs(engine)
    if engine == "ray":
        request.getfixturevalue("local_ray")
    names: dict[str, Any] = {"__name__": "page"}
    if engine == "tinker":
        import tinker

        old = torch.tensor([-2.0, -1.0, -0.5])
        names |= {"training_client": LocalClient(), "data": [cases._datum(tinker, old, old, old * 0 + 1, old * 0 + 1)]}
    with warnings.catch_warnings():
        exec(compile(text, "page", "exec"), names)
    if engine == "stable_baselines3":
        returns = [e["r"] for e in names["model"].ep_info_buffer]
        assert len(returns) > 10 and names["model"].num_timesteps == 2048
    if engine == "ray":
        assert names["result"]["training_iteration"] == 1
