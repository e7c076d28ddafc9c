"""Which engine carries which clip, and how: found out by trying.

``python tests/engines/matrix.py docs/data/engines.json docs/engines.md`` renews what this environment can try: run it
in each of the three environments (`.venv`, `.venv-verl`, `.venv-skyrl`).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, Tokens, tokens

import bandpo

REFUSED = "refused: "


def coefficient(case: Case, x: Tokens, clip: bandpo.Clip) -> torch.Tensor:
    """c by the clip itself; a clip of the batch sees what the engine's loss sees at once."""
    t = x.seen()
    if clip.looks_at != "batch" or not case.rows:
        return clip.coefficient(t)
    rows = [bandpo.Tokens(*(y[i : i + 1] for y in (x.new(), x.old, x.advantages, x.mask))) for i in range(len(x.old))]
    return torch.cat([clip.coefficient(row) for row in rows])


def attempt(case: Case, clip: Any, clip_args: dict[str, Any] | None = None, seed: int = 4) -> str:
    """How the engine carries a clip, after its gradient was compared with c; or its refusal."""
    x = case.fit(tokens(seed))
    try:
        loss, _ = case.ours(x, clip, clip_args)
    except bandpo.InputError as error:
        return f"{REFUSED}{error}"
    made = bandpo.get_clip(clip, **(clip_args or {}))
    torch.testing.assert_close(
        x.gradient(loss),
        case.carries(x, coefficient(case, x, made)),
        rtol=1e-5,
        atol=1e-6,
        msg=lambda m: f"{clip}: {m}",
    )
    if case.whole:
        return "policy_loss"
    return "margins" if made.as_bounds else "advantages"


def trl(clip: str) -> str:
    """How TRL carries a clip; that its gradient is c, tests/test_trl_clips.py tests."""
    from bandpo.engines.trl import BandGRPOConfig

    try:
        BandGRPOConfig("none", clip=clip, use_cpu=True, bf16=False)
    except bandpo.InputError as error:
        return f"{REFUSED}{error}"
    return "margins" if bandpo.get_clip(clip).as_bounds else "advantages"


def verl(clip: str) -> str:
    """How verl carries a clip; that its gradient is c, tests/verl/test_verl_clips.py tests."""
    from bandpo.engines.verl import BandLossConfig

    try:
        BandLossConfig(clip=clip)
    except bandpo.InputError as error:
        return f"{REFUSED}{error}"
    return "margins" if bandpo.get_clip(clip).as_bounds else "advantages"


BY_CONFIG = {"trl": trl, "verl": verl}


def matrix() -> dict[str, dict[str, str]]:
    """Each engine's word on every clip of the registry.

    Returns:
        Engine to clip to "margins", "advantages" or "policy_loss" where it is carried, "refused: WHY" where not, and
        "not tried: WHY" where the engine is not installed.
    """
    table: dict[str, dict[str, str]] = {}
    for engine, way in BY_CONFIG.items():
        there = any(importlib.metadata.distributions(name=engine))
        table[engine] = {clip: way(clip) if there else f"not tried: no {engine}" for clip in bandpo.list_clips()}
    for engine, make in CASES.items():
        try:
            case = make()
        except pytest.skip.Exception as missing:
            table[engine] = dict.fromkeys(bandpo.list_clips(), f"not tried: {missing}")
        else:
            table[engine] = {clip: attempt(case, clip) for clip in bandpo.list_clips()}
    return table


def short(word: str) -> str:
    """A cell of the table: the way, or what the engine lacks."""
    if not word.startswith(REFUSED):
        return word
    if "not proportional to A" in word:
        return "no: c is not linear in A"
    needs = re.search(r"needs (\w+)", word)
    assert needs is not None or "whole sequences" in word, word
    return "no: sequences" if needs is None else f"no: {needs[1]}"


def renew(known: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The table with the columns that can be tried here."""
    tried = {e: {c: short(w) for c, w in t.items()} for e, t in matrix().items() if "not tried" not in t["band"]}
    return {engine: tried.get(engine, known.get(engine, {})) for engine in (*BY_CONFIG, *CASES)}


def as_markdown(table: dict[str, dict[str, str]]) -> str:
    """The table of the page: a row a clip, a column an engine."""
    names = {"torchrl_ppo": "torchrl PPO", "torchrl_grpo": "torchrl GRPO", "prime_rl": "prime-rl", "rllib": "RLlib"}
    names |= {"trl": "TRL", "skyrl": "SkyRL"}
    lines = [f"| clip | {' | '.join(names.get(engine, engine) for engine in table)} |", "|---" * (len(table) + 1) + "|"]
    for clip in bandpo.list_clips():
        lines.append(f"| `{clip}` | {' | '.join(column.get(clip, 'not tried') for column in table.values())} |")
    return "\n".join(lines)


MARKS = "<!-- engines: made by tests/engines/matrix.py -->", "<!-- end of engines -->"

if __name__ == "__main__":
    data, page = map(Path, sys.argv[1:])
    found = renew(json.loads(data.read_text()) if data.exists() else {})
    data.write_text(json.dumps(found, indent=1) + "\n")
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{as_markdown(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
