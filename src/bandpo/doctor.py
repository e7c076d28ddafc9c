"""What ``bandpo doctor`` finds out: versions, the device, and whether each engine's hook fits what is installed."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bandpo._checks import InputError

PACKAGES = ("bandpo", "torch", "trl", "transformers", "accelerate", "datasets", "peft", "reasoning-gym", "matplotlib")
_EXTRA, _DOCS = 'pip install "bandpo[{}]" to use it', "see docs/engines.md"
ENGINES = {  # package: adapter, how to get the package
    "trl": ("bandpo.engines.trl", _EXTRA.format("train")),
    "verl": ("bandpo.engines.verl", 'pip install "bandpo[verl]", in an environment of its own, to use it'),
    "torchrl": ("bandpo.engines.torchrl", _EXTRA.format("engines")),
    "ray": ("bandpo.engines.rllib", _EXTRA.format("engines")),
    "tinker": ("bandpo.engines.tinker", _EXTRA.format("engines")),
    "skyrl": ("bandpo.engines.skyrl", _DOCS),
    "prime-rl": ("bandpo.engines.prime_rl", _DOCS),
    "slime": ("bandpo.engines.slime", _DOCS),
}
NEEDS = {"ray": "gymnasium"}  # Ray without RLlib is no engine, and verl installs it so


def examine() -> dict[str, Any]:
    """Look at the installation; an engine that is not installed is not imported.

    Returns:
        ``python``, ``platform``, ``device`` (name, kind, count, threads), ``packages`` (version or None by name) and
        ``engines``, a list of ``{"name", "version", "fits", "note"}`` in which ``fits`` is None where it is absent.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "engines": [_engine(name, *engine) for name, engine in ENGINES.items()],
    }


def as_text(found: dict[str, Any]) -> str:
    """Return what `examine` found as lines for people.

    Args:
        found: its result.

    Returns:
        Lines without a trailing newline.
    """
    device = found["device"]
    packages = {"Python": found["python"], **found["packages"]}
    width = max(map(len, packages)) + 2
    lines = [f"{name:<{width}}{number or 'not installed'}" for name, number in packages.items()]
    lines += [f"{'platform':<{width}}{found['platform']}", f"{'device':<{width}}{device['kind']}: {device['name']}", ""]
    for engine in found["engines"]:
        verdict = {True: "the hook fits", False: "DOES NOT FIT", None: "not installed"}[engine["fits"]]
        note = f": {engine['note']}" if engine["note"] else ""
        lines.append(f"engine {engine['name']} {engine['version'] or ''}".rstrip() + f", {verdict}{note}")
    return "\n".join(lines)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package.

    Args:
        package: its name on the index.

    Returns:
        The version; None when it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        kind, name, count = "cuda", torch.cuda.get_device_name(), torch.cuda.device_count()
    elif torch.backends.mps.is_available():
        kind, name, count = "mps", platform.processor() or platform.machine(), 1
    else:
        kind, name, count = "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads", 1
    return {"kind": kind, "name": name, "count": count, "threads": torch.get_num_threads()}


def _engine(name: str, module: str, hint: str) -> dict[str, Any]:
    """Import one engine if its framework is there and ask it whether its hook fits."""
    installed = installed_version(name)
    if installed is None or installed_version(NEEDS.get(name, name)) is None:
        return {"name": name, "version": None, "fits": None, "note": hint}
    try:
        importlib.import_module(module).check_seam()
    except (InputError, ImportError) as error:
        return {"name": name, "version": installed, "fits": False, "note": str(error)}
    return {"name": name, "version": installed, "fits": True, "note": ""}
