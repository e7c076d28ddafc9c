"""Statistics over ranks: 64 simulated ones in any order and any tree; and a run that loses one of its two processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_support import SHORT, records, train

import bandpo
from bandpo.loss.stats import COUNTS, ClipStats

RANKS, TOKENS = 64, 40_000
NUMBER = len(COUNTS)  # the fields before it are counts
# Each piece of 16,384 tokens is added in float32, and pieces in float64, which has 29 bits more: they add up exactly,
# in any order. Split otherwise, the pieces are others, and differ by what float32 rounds.
SPLIT = 2e-6
PATIENCE = 240.0  # seconds, where two seconds will do on an idle machine
SEEDS = st.integers(0, 2**32 - 1)
CLEAN = multiprocessing.get_context("forkserver")  # copies of a process that has the imports behind it and no threads
CLEAN.set_forkserver_preload(["bandpo.lab.trl.run", "lab_support"])


def tokens(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(TOKENS, generator=generator) ** 2
    move = 0.3 * torch.randn(TOKENS, generator=generator)
    return {
        "logps": (old * (1 + move)).clamp(max=0.0),
        "old_logps": old,
        "advantages": torch.randn(TOKENS, generator=generator).round(decimals=1),  # some are 0
        "mask": torch.rand(TOKENS, generator=generator) < 0.9,
    }


def split(chance: random.Random, count: int) -> list[torch.Tensor]:
    """Which tokens each rank has: any tokens, as many as it happens, some ranks none."""
    order = torch.tensor(chance.sample(range(count), count))
    cuts = sorted(chance.choices(range(count + 1), k=RANKS - 1))
    return list(torch.tensor_split(order, cuts))


def in_a_tree(chance: random.Random, parts: list[ClipStats]) -> ClipStats:
    """Join any two, again and again: every order and every shape of tree can come out."""
    parts = list(parts)
    while len(parts) > 1:
        one = parts.pop(chance.randrange(len(parts)))
        other = parts.pop(chance.randrange(len(parts)))
        parts.append(one + other)
    return parts[0]


def around_a_ring(chance: random.Random, parts: list[ClipStats]) -> ClipStats:
    """As an all_reduce over a ring: each chunk of the memory begins at another rank."""
    start, flat = chance.randrange(RANKS), [part.sums.flatten() for part in parts]
    chunks = []
    for i, chunk in enumerate(torch.arange(flat[0].numel()).tensor_split(RANKS)):
        found = torch.zeros(len(chunk), dtype=torch.float64)
        for k in range(RANKS):
            found = found + flat[(start + i + k) % RANKS][chunk]
        chunks.append(found)
    maxima = torch.stack([part.maxima for part in parts]).amax(0)
    return ClipStats(torch.cat(chunks).view(parts[0].sums.shape), maxima)


def differ(one: ClipStats, other: ClipStats) -> float:
    """Check that counts and maxima are equal, and return the worst relative difference of the float sums."""
    assert torch.equal(one.sums[..., :NUMBER], other.sums[..., :NUMBER])
    assert torch.equal(one.maxima, other.maxima)
    a, b = one.sums[..., NUMBER:], other.sums[..., NUMBER:]
    return float(((a - b).abs() / b.abs().clamp(min=1e-30)).max())


@pytest.mark.parametrize("clip", ["band", "capped"])
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_sixty_four_ranks_count_what_one_does(clip: str, seed: int) -> None:
    chance, chosen = random.Random(seed), bandpo.get_clip(clip)
    whole = tokens(seed % 5)
    alone = bandpo.clip_stats(**whole, clip=chosen)
    assert float(alone.sums[..., 0].sum()) == int(whole["mask"].sum())
    parts = [
        bandpo.clip_stats(**{name: x[mine] for name, x in whole.items()}, clip=chosen) for mine in split(chance, TOKENS)
    ]
    trees = [in_a_tree(chance, parts), in_a_tree(chance, parts), around_a_ring(chance, parts)]
    assert all(torch.equal(tree.sums, trees[0].sums) and differ(tree, trees[0]) == 0 for tree in trees)
    assert differ(trees[0], alone) <= SPLIT


@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_monitors_of_ranks_join_in_any_order(seed: int) -> None:
    """Of micro-batches that the ranks share out; a rank may get none."""
    chance, whole = random.Random(seed), tokens(0)
    alone = bandpo.Monitor("band")
    alone.update(**whole)
    ranks = [bandpo.Monitor("band") for _ in range(RANKS)]
    for piece in split(chance, TOKENS):
        chance.choice(ranks).update(**{name: x[piece] for name, x in whole.items()})
    chance.shuffle(ranks)
    while len(ranks) > 1:
        ranks[0].merge(ranks.pop(chance.randrange(1, len(ranks))))
    joined, want = (ClipStats(x.sums, x.maxima) for x in (ranks[0], alone))
    assert differ(joined, want) <= SPLIT
    a, b = (x.compute() for x in (ranks[0], alone))
    assert list(a) == list(b)
    torch.testing.assert_close(torch.stack(list(a.values())), torch.stack(list(b.values())), rtol=SPLIT, atol=0)


def test_counts_are_exact_as_far_as_a_double_goes() -> None:
    """Of 10^15 tokens, more than any run has; float32 would lose single ones beyond 2^24."""
    one = bandpo.clip_stats(**tokens(0))
    many = ClipStats(one.sums * 2.0**36, one.maxima)
    joined = many + one
    assert one.sums.dtype == torch.float64
    assert torch.equal(joined.sums[..., :NUMBER] - many.sums[..., :NUMBER], one.sums[..., :NUMBER])


# ---------------------------------------------------------------- two processes, one of them lost


def _rank(rank: int, port: int, words: str, out: Path, said: Path) -> None:
    """One process of torchrun's two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    with said.open("w") as file, redirect_stdout(StringIO()), redirect_stderr(file):
        code = train(words, out)
    sys.exit(code)


class Two:
    """`torchrun --nproc_per_node 2 -m bandpo train`, without torchrun, which would end the second process itself."""

    def __init__(self, words: str, out: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.out, self.said = out, [out.with_name(f"rank{rank}.txt") for rank in (0, 1)]
        self.ranks = [CLEAN.Process(target=_rank, args=(rank, port, words, out, self.said[rank])) for rank in (0, 1)]
        for rank in self.ranks:
            rank.start()

    @property
    def codes(self) -> dict[int, int]:
        """The exit codes of those that have ended."""
        return {i: rank.exitcode for i, rank in enumerate(self.ranks) if rank.exitcode is not None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def until(self, found: Callable[[], bool]) -> None:
        """Wait for it."""
        end = time.monotonic() + PATIENCE
        while not found():
            assert time.monotonic() < end, ("hangs", self.codes, [file.read_text() for file in self.said])
            time.sleep(0.05)

    def steps(self) -> int:
        log = self.out / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lost_process_ends_the_run_in_a_line_and_the_run_goes_on(tmp_path: Path) -> None:
    words, out = SHORT.replace("--max_steps 8", "--max_steps 24"), tmp_path / "run"
    go_on = rf"; go on with: torchrun --nproc_per_node 2 -m bandpo train demo .* --out {out} --resume"
    lost = r"another process of the run was lost \(.*\)"
    stopped = "stopped by SIGTERM, which torchrun sends when another process of the run is lost"
    for rank, sign, code, speaks, why in (
        (1, signal.SIGKILL, -signal.SIGKILL, 0, lost), (0, signal.SIGTERM, 1, 0, stopped),
        (0, signal.SIGKILL, -signal.SIGKILL, 1, lost),
    ):  # fmt: skip
        with Two(f"{words} --requeue", out) as two:
            there = two.steps()
            two.until(lambda two=two, there=there: two.steps() >= there + 3)
            os.kill(two.ranks[rank].pid, sign)
            two.until(lambda two=two: len(two.codes) == 2)
        assert two.codes == {rank: code, 1 - rank: 1}
        last = two.said[speaks].read_text().splitlines()[-1]
        assert re.fullmatch(why + go_on, last), last
        status, error = (json.loads((out / "run.json").read_text())[name] for name in ("status", "error"))
        assert speaks == 1 or (status == "failed" and re.fullmatch(why, error)), error
    with Two(f"{words} --resume", out) as two:
        two.until(lambda: len(two.codes) == 2)
    assert two.codes == {0: 0, 1: 0}, two.said[0].read_text()
    assert [record["step"] for record in records(out) if "loss" in record] == list(range(1, 25))
    assert json.loads((out / "run.json").read_text())["status"] == "done"
