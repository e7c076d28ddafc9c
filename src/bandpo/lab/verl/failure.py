"""Why verl stopped, out of its log: one line, where verl and Ray print hundreds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bandpo._input import InputError, nearest

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PROCESS = re.compile(r"^\((?P<who>[A-Za-z_]\w*)[^)]*\) ")  # Ray's prefix of a line that another process printed
_ERROR = re.compile(r"^(?P<kind>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.*))?$")
# Errors that only carry another one, or that come when everything is taken down.
_CARRIERS = ("RayTaskError", "ActorDiedError", "ActorUnavailableError", "HydraException", "SystemExit")
# Not an error of the worker's own, such as CUDA's out of memory: that one has a name and a text.
_LOST = (
    "The actor died unexpectedly", "unexpected system error", "Worker unexpectedly exits", "was killed due to memory",
    "WorkerCrashedError", "NodeDiedError", "ray.exceptions.OutOfMemoryError",
)  # fmt: skip
_NO_RAY = (
    "Could not find any running Ray instance", "Failed to connect to GCS", "Could not connect to Ray",
    "GCS has started but", "ray client connection timeout", "Unable to connect to GCS", "cannot be reached",
)  # fmt: skip

_NOTHING = ("no materializable trajectories", "Received an empty list as keys")
# What hydra, verl and Ray print, and what to say for it.
_SAID: dict[str, Callable[[re.Match[str]], str]] = {
    r"Could not override '([^']+)'": lambda m: f"{m[1]}: {no_such_key(m[1], known_keys())}",
    r"Could not append to config\. An item is already at '([^']+)'": lambda m: (
        f"+{m[1]}: verl has this key already; write it without the +"
    ),
    r"Error in call to target '([^']+)':\n?(.*)": lambda m: f"{m[1]} refuses its settings: {m[2]}",
    r"(?:mismatched input|no viable alternative|token recognition error|extraneous input).*": lambda m: (
        f"an override is not in hydra's grammar: {m[0]}"
    ),
    r"Total available GPUs ([\d.]+) is less than total desired GPUs (\d+)": lambda m: (
        f"Ray has {float(m[1]):g} GPUs and the recipe asks for {m[2]}; set verl.workers and verl.nodes to fit"
    ),
    r"ray\.exceptions\.AuthenticationError": lambda m: (
        "the Ray cluster wants a token: set RAY_AUTH_MODE=token, and have its ~/.ray/auth_token here"
    ),
}


def explain(log: str) -> str:
    """Return in one line why verl stopped, out of what it and Ray printed."""
    lines = [_PROCESS.sub("", line) for line in _COLOUR.sub("", log).replace("\r", "\n").splitlines()]
    for reason in (_refused, _said, _lost, _no_ray, _rollout, _own_error):
        if found := reason(lines):
            return " ".join(found.split())
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return " ".join(last.split())[:300]


def known_keys(*, every_engine: bool = False) -> list[str]:
    """Return the keys of the installed verl's configuration, with dots, or of every engine's; none without verl."""
    import yaml

    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(found.submodule_search_locations[0]) / "trainer" / "config"
    files = folder.glob(f"_generated_ppo_{'*' if every_engine else ''}trainer.yaml")
    try:
        return list(dict.fromkeys(name for file in files for name in _names(yaml.safe_load(file.read_text("utf-8")))))
    except (OSError, yaml.YAMLError):  # a later verl may have it elsewhere; the hint alone is lost
        return []


def no_such_key(key: str, known: list[str]) -> str:
    """Return what to say of a key that verl's configuration does not have."""
    return f"verl has no such key{nearest(key, known)}; write +{key} to add one"


def _names(config: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found.append(f"{before}{key}")
        if isinstance(value, dict):
            found += _names(value, f"{before}{key}.")
    return found


def _refused(lines: list[str]) -> str | None:
    """What bandpo itself raised in a process of verl's; the others then lose that process."""
    return _own_error([line for line in lines if line.startswith(f"{InputError.__module__}.InputError: ")])


def _said(lines: list[str]) -> str | None:
    text = "\n".join(lines)
    return next((say(found) for pattern, say in _SAID.items() if (found := re.search(pattern, text))), None)


def _lost(lines: list[str]) -> str | None:
    found = _first(lines, _LOST)
    return found and f"a worker was lost ({found})"


def _no_ray(lines: list[str]) -> str | None:
    found = _first(lines, _NO_RAY)
    return found and f"no Ray cluster answers ({found}); is it up, and is the address right?"


def _rollout(lines: list[str]) -> str | None:
    """When every rollout fails, verl's last error says only that there is nothing; the reason stands far above."""
    if not _first(lines, _NOTHING):
        return None
    marks = [i for i, line in enumerate(lines) if "Error in _run_prompt" in line]
    error = _own_error(lines[marks[0] : marks[1] if len(marks) > 1 else None]) if marks else None
    return f"every rollout failed: {error}" if error else None


def _own_error(lines: list[str]) -> str | None:
    found = None
    for line in lines:
        match = _ERROR.match(line)
        if match and match["kind"].split(".")[-1].split("(")[0] not in _CARRIERS:
            found = f"{match['kind'].split('.')[-1]}: {match['text'] or ''}".rstrip(": ")
    return found


def _first(lines: list[str], signs: tuple[str, ...]) -> str | None:
    """The first line with one of these signs, cut short."""
    return next((line.strip()[:200] for line in lines if any(sign in line for sign in signs)), None)
