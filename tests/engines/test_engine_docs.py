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
from cases import tokens

import bandpo

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


def check_prime_rl(text: str) -> None:
    cases.prime_rl()
    from prime_rl.trainer.rl.loss import LossInputs

    settings = tomllib.loads(text)["trainer"]["loss"]
    module, _, name = settings["import_path"].rpartition(".")
    old, mask = torch.tensor([-1.0, -2.0]), torch.tensor([True, True])
    inputs = LossInputs(old + 0.3, old, None, torch.ones(2), mask)
    out = getattr(importlib.import_module(module), name)(inputs, **settings["kwargs"])
    assert torch.isfinite(out.loss) and settings["kwargs"]["clip"] == "band"


def check_slime(text: str) -> None:
    """The settings reach slime's loss: it is the one of the band that they describe, and of no other."""
    case, x = cases.slime(), tokens()
    from bandpo.engines.slime import band_loss

    got, _ = cases.call_slime(x, band_loss, **yaml.safe_load(text))
    want, narrower = (case.ours(x, bandpo.Band(divergence="kl", delta=delta), None)[0] for delta in (0.05, 0.02))
    assert got == want != narrower


@pytest.mark.parametrize(("language", "text", "engine"), RUN)
def test_block_runs(
    language: str, text: str, engine: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if language in ("toml", "yaml"):  # the settings of prime-rl and slime
        return {"prime_rl": check_prime_rl, "slime": check_slime}[engine](text)
    cases.needs(engine)
    if engine == "ray":
        request.getfixturevalue("local_ray")
    names: dict[str, Any] = {"__name__": "page"}
    if engine == "tinker":
        import tinker

        old = torch.tensor([-2.0, -1.0, -0.5])
        names |= {"training_client": LocalClient(), "data": [cases._datum(tinker, old, old, old * 0 + 1, old * 0 + 1)]}
    asked, bounds = [], bandpo.Band.bounds
    monkeypatch.setattr(bandpo.Band, "bounds", lambda clip, old: asked.append(old) or bounds(clip, old))
    with warnings.catch_warnings():
        exec(compile(text, "page", "exec"), names)
    if engine == "stable_baselines3":
        returns = [e["r"] for e in names["model"].ep_info_buffer]
        assert len(returns) > 10 and names["model"].num_timesteps == 2048
        assert len(asked) == 2 * 4 * 10 * 8  # sides, rollouts, epochs, minibatches: SB3 clamps with the band each time
    if engine == "ray":
        assert names["result"]["training_iteration"] == 1
    if engine == "torch":  # a loop of one's own
        t = bandpo.Tokens(names["logps"], names["old_logps"], names["advantages"])
        c = bandpo.get_clip("sapo" if "sapo" in text else "band").coefficient(t)
        torch.testing.assert_close(torch.autograd.grad(names["loss"], names["logps"])[0], -c / c.numel())
        assert not torch.equal(c, t.weighted)
