"""The operator and the loss against the plain way to write them: ratios from one run, one thread, fastest of several.

python benchmarks/bench_core.py [--tokens 262144] [--rounds 60] [--no-compile]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import paired, write
from torch import Tensor

import bandpo

CLOSED = ("kl", "tv", "chi2")
# an f of one's own is solved as it stands, from f alone
OWN = (
    bandpo.Divergence("own: (u - 1)^2 / (u + 1)", lambda u: (u - 1) ** 2 / (u + 1)),
    bandpo.Divergence("own: u - 1 - log u", lambda u: u - 1 - torch.log(u)),
)
DIVERGENCES = (*CLOSED, "neyman", "hellinger", "reverse_kl", "js", "alpha:0.5", "alpha:-1.5", "alpha:3", *OWN)


def _name(divergence: str | bandpo.Divergence) -> str:
    return divergence if isinstance(divergence, str) else divergence.name


def bisection(old_logps: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """The KL band by 50 halvings of the ratio on each side, as one writes it plainly in torch."""
    p = old_logps.exp()

    def inside(r: Tensor) -> Tensor:
        return -p * torch.log(r) - (1 - p) * torch.log((1 - r * p) / (1 - p)) <= delta

    low_out, low_in = torch.zeros_like(p), torch.ones_like(p)
    high_in, high_out = torch.ones_like(p), 1 / p
    for _ in range(50):
        middle = (low_out + low_in) / 2
        ok = inside(middle)
        low_in, low_out = torch.where(ok, middle, low_in), torch.where(ok, low_out, middle)
        middle = (high_in + high_out) / 2
        ok = inside(middle)
        high_in, high_out = torch.where(ok, middle, high_in), torch.where(ok, high_out, middle)
    return low_in, high_in


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """PPO's loss the usual way: exp, clamp, max, masked mean, autograd."""
    ratio = torch.exp(logps - old_logps)
    per_token = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2))
    return (per_token * mask).sum() / mask.sum()


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    old = torch.log_softmax(2 * torch.randn(tokens, 8), -1)[:, 0].clone()
    logps = (old + 0.2 * torch.randn(tokens)).clamp(max=-1e-6)
    flat = logps, old, torch.randn(tokens), (torch.rand(tokens) > 0.1).float()
    return tuple(x.view(-1, min(tokens, 1024)) for x in flat)  # type: ignore[return-value]  # as sequences


def losses(tokens: int) -> dict[str, Callable[[], Tensor]]:
    logps, old, advantages, mask = batch(tokens)
    clips: dict[str, Any] = {_name(d): bandpo.Band(divergence=d) for d in DIVERGENCES}
    clips |= {"kl cap 10": bandpo.Band(cap=10.0)}
    clips |= {name: bandpo.get_clip(name) for name in bandpo.list_clips() if name != "band"}
    table: dict[str, Callable[[Tensor], Tensor]] = {"ppo": lambda x: ppo_loss(x, old, advantages, mask)}
    known = {"rollout_logps": old, "entropies": -old, "rewards": advantages.sign(), "state_divergence": -old / 100}
    for name, clip in clips.items():
        for metrics in (False, True) if name in CLOSED or "kl cap" in name else (False,):
            more: dict[str, Any] = {"clip": clip, "metrics": metrics, **{need: known[need] for need in clip.needs}}
            table[f"{name}{' + metrics' if metrics else ''}"] = lambda x, more=more: (
                bandpo.policy_loss(x, old, advantages, mask, **more).loss
            )
    return {name: lambda f=f: step(f, logps) for name, f in table.items()}


def step(loss: Callable[[Tensor], Tensor], logps: Tensor) -> Tensor:
    x = logps.detach().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    return x.grad


def compiled(tokens: int) -> dict[str, Callable[[], Tensor]]:
    logps, old, advantages, mask = batch(tokens)
    table = {
        "ppo": torch.compile(lambda x: ppo_loss(x, old, advantages, mask)),
        # what no loss can go below: to read, weigh and sum; and with the two exponentials that tv needs
        "weighted sum": torch.compile(lambda x: (x * advantages * mask).sum()),
        "weighted sum with two exp": torch.compile(lambda x: (torch.exp(x - old) * torch.exp(old) * mask).sum()),
    }
    for name in CLOSED:
        clip = bandpo.Band(divergence=name)
        table[name] = torch.compile(
            lambda x, clip=clip: bandpo.policy_loss(x, old, advantages, mask, clip=clip, metrics=False).loss
        )
    return {name: lambda f=f: step(f, logps) for name, f in table.items()}


def rows(what: str, times: dict[str, float], base: str, tokens: int) -> list[dict[str, Any]]:
    return [
        {"what": f"{what}: {name}", "ns_per_token": t / tokens * 1e9, f"ratio_to_{base}": t / times[base]}
        for name, t in times.items()
    ]


def bands(tokens: int) -> dict[str, Callable[[], object]]:
    old = batch(tokens)[1]
    table: dict[str, Callable[[], object]] = {"bisection": lambda: bisection(old, 0.05)}
    for divergence in DIVERGENCES:
        table[_name(divergence)] = lambda divergence=divergence: bandpo.band(old, 0.05, divergence)
    return table


def imports(rounds: int) -> list[dict[str, Any]]:
    best = dict.fromkeys(("import torch", "import bandpo"), float("inf"))
    for _ in range(rounds):
        for code in best:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            best[code] = min(best[code], time.perf_counter() - start)
    return [
        {
            "what": "import bandpo",
            "seconds": best["import bandpo"],
            "ratio_to_torch": best["import bandpo"] / best["import torch"],
        }
    ]


def memory(tokens: int) -> list[dict[str, Any]]:
    """Peak extra memory of one step, forward and backward, in float32 tensors of the tokens' shape."""
    table = {name: f for name, f in losses(tokens).items() if name.removesuffix(" + metrics") in ("ppo", *CLOSED)}
    held = {name: peak(f) / (4 * tokens) for name, f in table.items()}
    return [
        {"what": f"memory: {name}", "float32_tensors": n, "ratio_to_ppo": n / held["ppo"]} for name, n in held.items()
    ]


def peak(run: Callable[[], Tensor]) -> int:
    """The most bytes held at once beyond those held before."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = rows("band", paired(bands(args.tokens), max(3, args.rounds // 6)), "bisection", args.tokens)
    for row in table:
        row["times_faster"] = 1 / row["ratio_to_bisection"]
    table += rows("policy_loss eager", paired(losses(args.tokens), args.rounds), "ppo", args.tokens)
    if not args.no_compile:
        table += rows("policy_loss compiled", paired(compiled(args.tokens), args.rounds, warmup=5), "ppo", args.tokens)
    write("core", table + memory(args.tokens) + imports(10))


if __name__ == "__main__":
    main()
