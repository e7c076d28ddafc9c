"""`bandpo explain` on a million tokens, in every form of log: time and peak memory of the whole command.

Processor time is user and system together, Python's start and PyTorch's import included. Machines that run other things
lengthen it, and wall time more, so the import of PyTorch alone and the machine's load stand beside both. Each form is
run `--rounds` times in turn with one thread; the medians are written, and the least, which other work disturbs least.
Every log holds the same tokens: log-probabilities, old ones, advantages, a mask, those of the rollout engine and the
entropies; a run's folder has the first three alone. Target: <= 5 s and <= 1 GB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write

ROWS, COLUMNS = 2000, 640  # four fifths are tokens, the rest is padding
BATCH = 64  # sequences of a dumped batch
TRL = {"old_logps": "old_per_token_logps", "mask": "completion_mask", "rollout_logps": "sampling_per_token_logps"}
VERL = {"logps": "log_probs", "old_logps": "old_log_probs", "mask": "response_mask"}
VERL |= {"rollout_logps": "rollout_log_probs", "entropies": "entropys"}
# compiled once, as at a user's
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}


def tokens(rows: int) -> dict[str, np.ndarray]:
    """Return arrays (sequence, token), and advantages (sequence,)."""
    random = np.random.default_rng(0)
    shape = (rows, COLUMNS)
    old = -random.exponential(0.6, shape)
    lengths = COLUMNS - random.integers(0, 2 * COLUMNS // 5 + 1, rows)
    found = {
        "logps": np.minimum(old + 0.1 * random.standard_normal(shape), 0.0),
        "old_logps": old,
        "advantages": random.standard_normal(rows),
        "rollout_logps": np.minimum(old + 0.02 * random.standard_normal(shape), 0.0),
        "entropies": random.exponential(0.6, shape),
    }
    mask = np.arange(COLUMNS) < lengths[:, None]
    return {name: x.astype(np.float32) for name, x in found.items()} | {"mask": mask}


def renamed(x: dict[str, np.ndarray], names: dict[str, str], whole: bool) -> list[dict[str, torch.Tensor]]:
    """Return batches as a trainer hands them to its loss, under its names; `whole`: an advantage for each token."""
    x = x | ({"advantages": np.repeat(x["advantages"][:, None], COLUMNS, 1)} if whole else {})
    return [
        {names.get(name, name): torch.from_numpy(a[i : i + BATCH].copy()) for name, a in x.items()}
        for i in range(0, len(x["mask"]), BATCH)
    ]


def records(x: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return a record for each sequence, without padding."""
    names = [name for name in x if name != "mask"]
    return [
        {name: np.round(x[name][i][m].astype(float), 6).tolist() if x[name].ndim > 1 else float(x[name][i])
         for name in names}
        for i, m in enumerate(x["mask"])
    ]  # fmt: skip


def make(folder: Path, rows: int) -> None:
    """Write the logs, one of each form."""
    import pyarrow
    from pyarrow import parquet

    x = tokens(rows)
    mask, lengths = x["mask"], x["mask"].sum(1)
    flat = {name: a[mask] if a.ndim > 1 else np.repeat(a, lengths) for name, a in x.items() if name != "mask"}
    flat["sequence"] = np.repeat(np.arange(len(lengths)), lengths)
    np.savez_compressed(folder / "padded.npz", **x)  # type: ignore[arg-type]
    np.savez(folder / "flat.npz", **flat)  # type: ignore[arg-type]
    torch.save(renamed(x, TRL, whole=False), folder / "trl.pt")
    torch.save(renamed(x, VERL, whole=True), folder / "verl.pt")
    (folder / "sequences.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(x)))
    rounded = {n: (a if n == "sequence" else np.round(a.astype(float), 6)).tolist() for n, a in flat.items()}
    one_each = (dict(zip(rounded, row, strict=True)) for row in zip(*rounded.values(), strict=True))
    (folder / "tokens.jsonl").write_text("".join(json.dumps(r) + "\n" for r in one_each))
    lists = {
        n: pyarrow.array([a[m] for a, m in zip(x[n], mask, strict=True)]) for n in flat if n in x and x[n].ndim > 1
    }
    parquet.write_table(pyarrow.table(lists | {"advantages": x["advantages"]}), folder / "sequences.parquet")
    parquet.write_table(pyarrow.table(flat), folder / "tokens.parquet")
    (folder / "run").mkdir()
    kept = {name: flat[name] for name in ("old_logps", "logps", "advantages")}
    np.savez_compressed(folder / "run" / "tokens.npz", **kept, step=np.zeros(len(flat["logps"]), np.int32))
    (folder / "run" / "run.json").write_text(json.dumps({"clip": "band", "clip_args": {"delta": 0.05}}))


def measure(*words: str) -> tuple[float, float, float, int]:
    """Run Python; return its seconds of wall and of processor, its peak memory in MB and the tokens that it counted."""
    command = [sys.executable, *words]
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, env=ENVIRONMENT)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
        out.seek(0)
        text = out.read()
    tokens = json.loads(text)["counts"]["tokens"] if text else 0
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"sequences of up to {COLUMNS} tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, because the memory of this one counts as the commands' until they start
        writer = multiprocessing.get_context("spawn").Process(target=make, args=(Path(folder), args.rows))
        writer.start()
        writer.join()
        logs = {path.name: path for path in sorted(Path(folder).iterdir())}
        commands = {f"bandpo explain {name}": ("-m", "bandpo", "explain", str(x), "--json") for name, x in logs.items()}
        commands = {"import torch": ("-c", "import torch"), **commands}
        found: dict[str, list[tuple[float, float, float, int]]] = {what: [] for what in commands}
        for _ in range(args.rounds):
            for what, words in commands.items():
                found[what].append(measure(*words))
        rows = [
            {
                "what": what,
                "tokens": runs[0][3],
                "seconds": statistics.median(x[0] for x in runs),
                "seconds_least": min(x[0] for x in runs),
                "processor_seconds": statistics.median(x[1] for x in runs),
                "processor_seconds_least": min(x[1] for x in runs),
                "processor_seconds_most": max(x[1] for x in runs),
                "peak_megabytes": max(x[2] for x in runs),
                "load_average": os.getloadavg()[1],
            }
            for what, runs in found.items()
        ]
    write("explain", rows)


if __name__ == "__main__":
    main()
