"""What ``bandpo doctor`` finds out: versions, the device, and whether each engine's hook fits what is installed."""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Any

from bandpo.engines._hosts import HOSTS, TRIED, TRIED_PYTHON, Host, untried
from bandpo.engines._hosts import installed_version as installed_version

PACKAGES = ("bandpo", "torch", "trl", "transformers", "accelerate", "datasets", "peft", "reasoning-gym", "matplotlib")


def examine() -> dict[str, Any]:
    """Look at the installation; an engine that is not installed is not imported.

    Returns:
        ``python``, ``platform``, ``device`` (name, kind, count, threads), ``packages`` (version or None by name),
        ``engines``, a list of ``{"name", "version", "fits", "plugged", "note"}``: ``fits`` is None where it is absent,
        ``plugged`` says whether an engine that loads plug-ins has loaded ours, and is None for the others; and
        ``untried``, a line for each version outside those that the tests ran on, which is no error.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "engines": [_engine(adapter, host) for adapter, host in HOSTS.items()],
        "untried": _untried(),
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
        verdict += {True: ", loaded as its plug-in", False: ", NOT LOADED as its plug-in", None: ""}[engine["plugged"]]
        note = f": {engine['note']}" if engine["note"] else ""
        lines.append(f"engine {engine['name']} {engine['version'] or ''}".rstrip() + f", {verdict}{note}")
    return "\n".join([*lines, *(f"note: {line}" for line in found["untried"])])


def _untried() -> list[str]:
    """A line for each version installed that is older or newer than the ones tried."""
    rows: list[tuple[str, str | None, tuple[str, str]]] = [("Python", platform.python_version(), TRIED_PYTHON)]
    rows += [(name, installed_version(name), tried) for name, tried in TRIED.items()]
    rows += [(host.package, host.version(), host.tried) for host in HOSTS.values() if host.tried]
    return [line for name, number, tried in rows if number and (line := untried(name, number, tried))]


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        kind, name, count = "cuda", torch.cuda.get_device_name(), torch.cuda.device_count()
    elif torch.backends.mps.is_available():
        kind, name, count = "mps", platform.processor() or platform.machine(), 1
    else:
        kind, name, count = "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads", 1
    return {"kind": kind, "name": name, "count": count, "threads": torch.get_num_threads()}


def _engine(adapter: str, host: Host) -> dict[str, Any]:
    """Import one adapter if its framework is there and ask it whether its hook fits."""
    module = f"bandpo.engines.{adapter}"
    found: dict[str, Any] = {
        "name": host.package,
        "version": host.version(),
        "fits": None,
        "plugged": None,
        "note": host.way,
    }
    if found["version"] is None:
        return found
    try:
        if host.plugs:
            importlib.import_module(host.package)
            found["plugged"] = module in sys.modules
        importlib.import_module(module).check_seam()
    except (Exception, SystemExit) as error:  # whatever a framework of another version does
        return found | {"fits": False, "note": str(error) or repr(error)}
    return found | {"fits": True, "note": ""}
