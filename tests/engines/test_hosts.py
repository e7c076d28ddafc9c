"""An engine that is absent, of another version or without what the adapter needs: one line with the way out."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cases import CASES

from bandpo import InputError, doctor
from bandpo.engines._hosts import HOSTS, Host

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines, at import
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
REMOVED = [  # adapter, where in it, what its seam needs there
    ("trl", "GRPOTrainer", "_compute_loss"),
    ("torchrl", "GRPOLoss", "_compute_policy_objective"),
    ("torchrl", "ClipPPOLoss", "forward"),
    ("torchrl", "LossModule", "_reduce_loss"),
    ("rllib", "PPOTorchLearner", "compute_loss_for_module"),
    ("tinker", "tinker.TrainingClient", "forward_backward_custom"),
    ("skyrl", "ppo_utils", "ppo_policy_loss"),
    ("slime", "host", "policy_loss_function"),
    ("slime", "host", "compute_policy_loss"),
]


@pytest.mark.parametrize("name", HOSTS)
def test_an_engine_that_is_not_installed_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = HOSTS[name].package.replace("-", "_")
    for module in [root, *(m for m in sys.modules if m.startswith(f"{root}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"bandpo.engines.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"bandpo.engines.{name}")
    message = str(caught.value)
    assert message.startswith(HOSTS[name].package) and "\n" not in message
    assert root in message and f"must be {HOSTS[name].fits}: pip install '" in message


def test_a_version_without_the_class_is_told_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    CASES["torchrl_grpo"]()
    import torchrl.objectives.llm

    monkeypatch.delattr(torchrl.objectives.llm, "GRPOLoss")
    monkeypatch.delitem(sys.modules, "bandpo.engines.torchrl", raising=False)
    with pytest.raises(ImportError, match=r"^torchrl==\S+: cannot import name 'GRPOLoss'.*; must be torchrl>="):
        importlib.import_module("bandpo.engines.torchrl")


def find(adapter: str, owner: str) -> tuple[Any, Any]:
    for case in CASES:
        if case.startswith(adapter):
            CASES[case]()  # skips what is not installed
    module = importlib.import_module(f"bandpo.engines.{adapter}")
    place = module
    for part in owner.split("."):
        place = getattr(place, part)
    return module, place


class Without:
    """A class or module without one of its names, inherited ones too."""

    def __init__(self, base: Any, name: str) -> None:
        self._base, self._name, self.__name__ = base, name, base.__name__

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._base, name)


@pytest.mark.parametrize(("adapter", "owner", "name"), REMOVED)
def test_a_function_that_is_gone_is_named(adapter: str, owner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, place = find(adapter, owner)
    parent, _, last = owner.rpartition(".")
    monkeypatch.setattr(getattr(module, parent) if parent else module, last, Without(place, name))
    with pytest.raises(InputError, match=f"has no {name} any more, where the clip goes; must be ") as caught:
        module.check_seam()
    assert "\n" not in str(caught.value)


def test_doctor_survives_whatever_an_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down() -> None:
        raise RuntimeError

    module, _ = find("torchrl", "GRPOLoss")
    monkeypatch.setattr(module, "check_seam", break_down)
    found = next(e for e in doctor.examine()["engines"] if e["name"] == "torchrl")
    assert (found["fits"], found["note"]) == (False, "RuntimeError()")


def test_doctor_says_whether_an_engine_loads_our_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    find("torchrl", "GRPOLoss")
    monkeypatch.setattr(doctor, "HOSTS", {"torchrl": Host("torch", "any torch", "", plugs=True)})
    assert "the hook fits, loaded as its plug-in" in doctor.as_text(doctor.examine())
    monkeypatch.delitem(sys.modules, "bandpo.engines.torchrl")
    assert "the hook fits, NOT LOADED as its plug-in" in doctor.as_text(doctor.examine())


def test_the_ranges_are_those_of_the_package() -> None:
    extras = PROJECT["optional-dependencies"]
    for name, extra in {"trl": "trl", "verl": "verl", "torchrl": "torchrl", "rllib": "ray", "tinker": "tinker"}.items():
        assert HOSTS[name].allows in extras[extra] and f"'.[{extra}]' in a checkout" in HOSTS[name].way
    plugins = PROJECT["entry-points"]["verl.plugins"]
    assert plugins == {"bandpo": "bandpo.engines.verl"} and HOSTS["verl"].plugs
