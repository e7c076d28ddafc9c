"""Logs of tokens: the same tokens in every format are the same tokens; one line for everything that is none."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

import bandpo
from bandpo import cli
from bandpo._input import InputError
from bandpo.analysis.explain import Explainer
from bandpo.lab import token_log, token_sources
from bandpo.lab.token_log import open_log
from bandpo.lab.token_sources import Jsonl

FIELDS = ("logps", "old_logps", "rollout_logps")


def arrays(rows: int = 9, columns: int = 14) -> dict[str, np.ndarray]:
    """Padded tokens; what stands in padding must not matter."""
    random = np.random.default_rng(0)
    old = -random.exponential(1.0, (rows, columns)).astype(np.float32)
    mask = np.arange(columns) < random.integers(1, columns + 1, (rows, 1))
    new = old * np.exp(0.3 * random.standard_normal(old.shape)).astype(np.float32)
    found = {"logps": new, "old_logps": old, "rollout_logps": np.minimum(old + 0.01, 0).astype(np.float32)}
    found = {name: np.where(mask, x, np.nan).astype(np.float32) for name, x in found.items()}
    return found | {"mask": mask, "advantages": random.standard_normal(rows).astype(np.float32)}


def records(x: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {name: x[name][i][m].tolist() for name in FIELDS} | {"advantages": float(x["advantages"][i])}
        for i, m in enumerate(x["mask"])
    ]


def flat(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    wide = x | {"advantages": np.broadcast_to(x["advantages"][:, None], x["mask"].shape)}
    return {name: wide[name][x["mask"]] for name in (*FIELDS, "advantages")}


def zeros(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.nan_to_num(v) if v.dtype == np.float32 else v for k, v in x.items()}


def lengths(x: dict[str, np.ndarray]) -> np.ndarray:
    return x["mask"].sum(1)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokens_of(x: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    ids = np.repeat([f"s{i}" for i in range(len(lengths(x)))], lengths(x)).tolist()
    columns = {name: v.tolist() for name, v in flat(x).items()} | {"sequence": ids}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def write_fortran(path: Path, x: dict[str, np.ndarray]) -> None:
    np.savez(path, **{k: np.asfortranarray(v) for k, v in x.items()})  # type: ignore[arg-type]


def tensors(x: dict[str, np.ndarray], **names: str) -> dict[str, torch.Tensor]:
    return {names.get(k, k): torch.from_numpy(v.copy()) for k, v in x.items()}


VERL = {
    "logps": "log_probs",
    "old_logps": "old_log_probs",
    "rollout_logps": "rollout_log_probs",
    "mask": "response_mask",
}
TRL = {
    "logps": "logps",
    "old_logps": "old_per_token_logps",
    "rollout_logps": "sampling_per_token_logps",
    "mask": "completion_mask",
}


def as_trl(x: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """With a tool's tokens, which TRL masks apart."""
    batch = tensors(x, **TRL)
    wide = [torch.cat([batch[k], batch[k][:, :1]], 1) for k in list(batch) if batch[k].dim() > 1]
    out = dict(zip([k for k in batch if batch[k].dim() > 1], wide, strict=True)) | {"advantages": batch["advantages"]}
    out["completion_mask"][:, -1] = 1
    tool = torch.ones_like(out["completion_mask"], dtype=torch.int64)
    tool[:, -1] = 0
    return out | {"tool_mask": tool, "prompt_ids": torch.zeros(len(tool), 3, dtype=torch.int64)}


def by_halves(x: dict[str, np.ndarray]) -> list[dict[str, torch.Tensor]]:
    return [{k: v[i : i + 5] for k, v in tensors(x).items()} for i in (0, 5)]


WRITERS: dict[str, tuple[str, Callable[[Path, dict[str, np.ndarray]], object]]] = {
    "padded": ("x.npz", lambda p, x: np.savez_compressed(p, **x)),  # type: ignore[arg-type]
    "padded, advantages in a column": (
        "x.npz",
        lambda p, x: np.savez(p, **x | {"advantages": x["advantages"][:, None]}),
    ),
    "columns first": ("x.npz", write_fortran),
    "padded, lengths for a mask": (
        "x.npz",
        lambda p, x: np.savez(p, lengths=lengths(x), **{k: v for k, v in zeros(x).items() if k != "mask"}),
    ),
    "one after the other, lengths": ("x.npz", lambda p, x: np.savez(p, **flat(x), lengths=lengths(x))),
    "advantages by sequence": (
        "x.npz",
        lambda p, x: np.savez(p, **flat(x) | {"advantages": x["advantages"]}, lengths=lengths(x)),
    ),
    "sequence numbers": (
        "x.npz",
        lambda p, x: np.savez(p, **flat(x), sequence=np.repeat(np.arange(9) * 3, lengths(x))),
    ),
    "torch": ("x.pt", lambda p, x: torch.save(tensors(x), p)),
    "torch, old format": ("x.bin", lambda p, x: torch.save(tensors(x), p, _use_new_zipfile_serialization=False)),
    "torch, float64": ("x.pth", lambda p, x: torch.save({k: v.double() for k, v in tensors(x).items()}, p)),
    "torch, two batches": ("x.pt", lambda p, x: torch.save(by_halves(x), p)),
    "verl": ("x.pt", lambda p, x: torch.save(tensors(zeros(x), **VERL) | {"responses": torch.zeros(9, 14)}, p)),
    "verl, nested": ("x.pt", lambda p, x: torch.save({"batch": tensors(zeros(x), **VERL), "meta": {"step": 3}}, p)),
    "trl": ("x.pt", lambda p, x: torch.save(as_trl(x), p)),
    "a line a sequence": ("x.jsonl", lambda p, x: lines(p, records(x))),
    "a line a token": ("x.jsonl", lambda p, x: lines(p, tokens_of(x))),
    "a row a sequence": ("x.parquet", lambda p, x: parquet.write_table(pyarrow.Table.from_pylist(records(x)), p)),
    "a row a token": ("x.parquet", lambda p, x: parquet.write_table(pyarrow.Table.from_pylist(tokens_of(x)), p)),
    "a run's folder": ("tokens.npz", lambda p, x: np.savez(p, **x)),  # type: ignore[arg-type]
}


def explain(path: Path, batch: int | None = None) -> dict[str, Any]:
    explainer = Explainer("gspo", batch=batch)
    for part in open_log(path).parts(batch):
        explainer.update(**part)  # type: ignore[arg-type]
    found = explainer.compute().to_dict()
    return {k: v for k, v in found.items() if k not in ("counts", "remarks")} | {
        "n": [found["counts"][k] for k in ("tokens", "sequences")]
    }


@pytest.mark.parametrize("part", [1 << 17, 20])
@pytest.mark.parametrize("how", WRITERS)
def test_every_format_holds_the_same_tokens(
    how: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_log, "PART", part)
    x = arrays()
    name, write = WRITERS[how]
    write(tmp_path / name, x)
    explainer = Explainer("gspo", batch=4)
    explainer.update(**{k: torch.from_numpy(v.copy()) for k, v in x.items()})  # type: ignore[arg-type]
    want = explainer.compute().to_dict()
    found = explain(tmp_path if how == "a run's folder" else tmp_path / name, batch=None if "two" in how else 4)
    assert found["n"] == [int(x["mask"].sum()), 9]
    assert _numbers(found["effect"]) == pytest.approx(_numbers(want["effect"]), rel=1e-5, abs=1e-9)
    assert _numbers(found["sequence"]) == pytest.approx(_numbers(want["sequence"]), rel=1e-5)
    assert _numbers(found["rollout"]) == pytest.approx(_numbers(want["rollout"]), rel=1e-4)
    if "two" not in how:  # clips that look at the batch saw the same batches
        mine, theirs = (
            [row for row in x["clips"] if row["clip"] != "clip_cov"] for x in (found, want)
        )  # hashes digits
        assert _numbers(mine) == pytest.approx(_numbers(theirs), rel=1e-5)


@pytest.mark.parametrize("how", ["one after the other, lengths", "a line a sequence", "a row a token", "two"])
def test_clips_of_the_batch_see_all_sequences_of_a_small_log(how: str, tmp_path: Path) -> None:
    x = arrays()
    name, write = WRITERS["torch, two batches" if how == "two" else how]
    write(tmp_path / name, x)
    want = bandpo.explain(**{k: torch.from_numpy(v.copy()) for k, v in x.items()}, clip="kl_cov")  # type: ignore[arg-type]
    found = open_log(tmp_path / name).explained(Explainer("kl_cov"))
    assert _numbers(found.effect) == pytest.approx(_numbers(want.effect), rel=1e-5, abs=1e-9)


def _numbers(x: Any) -> list[float]:
    if isinstance(x, (dict, list)):
        return [y for value in (x.values() if isinstance(x, dict) else x) for y in _numbers(value)]
    return [float(x)] if isinstance(x, (int, float)) else []


def test_tokens_without_sequences_stay_so(tmp_path: Path) -> None:
    x = flat(arrays())
    np.savez(tmp_path / "x.npz", **x)  # type: ignore[arg-type]
    lines(tmp_path / "x.jsonl", [dict(zip(x, map(float, row), strict=True)) for row in zip(*x.values(), strict=True)])
    for name in ("x.npz", "x.jsonl"):
        parts = list(open_log(tmp_path / name).parts())
        assert [part["logps"].dim() for part in parts] == [1]
        assert torch.equal(parts[0]["logps"].float(), torch.from_numpy(x["logps"]))


def test_a_run_folder_names_its_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "tokens.npz", **flat(arrays()))  # type: ignore[arg-type]
    (tmp_path / "run.json").write_text(json.dumps({"clip": "band", "clip_args": {"delta": 0.02}}))
    assert cli.main(["explain", str(tmp_path), "--json"]) == 0
    assert "delta=0.02" in json.loads(capsys.readouterr().out)["clip"]["is"]
    assert cli.main(["explain", str(tmp_path), "--clip", "sapo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clip"]["name"] == "sapo"


def test_what_has_to_be_assumed_is_said(tmp_path: Path) -> None:
    x = as_trl(arrays())
    torch.save({k: v for k, v in x.items() if k != "old_per_token_logps"}, tmp_path / "x.pt")
    log = open_log(tmp_path / "x.pt")
    part = next(log.parts())
    assert torch.equal(part["old_logps"].nan_to_num(), part["logps"].nan_to_num())
    assert "every ratio is 1" in log.remarks[0]
    torch.save(x | {"per_token_logps": x["logps"]}, tmp_path / "y.pt")
    assert "logps and per_token_logps are the same field: logps is used" in open_log(tmp_path / "y.pt").remarks
    text = "".join(json.dumps(row) + "\n" for row in records(arrays()))
    (tmp_path / "x.jsonl").write_text(text[:-40])
    log = open_log(tmp_path / "x.jsonl")
    assert sum(len(part["logps"]) for part in log.parts()) == 8 and "line 9 is cut short, and left out" in log.remarks


def test_nulls_are_counted_as_missing(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", [{"logps": [-1.0, None], "old_logps": [-1.1, -2.0], "advantages": 1.0}] * 60)
    assert cli.main(["explain", str(tmp_path / "x.jsonl")]) == 0
    explainer = Explainer()
    for part in open_log(tmp_path / "x.jsonl").parts():
        explainer.update(**part)  # type: ignore[arg-type]
    found = explainer.compute()
    assert (
        found.counts["left_out"] == 60
        and "logps is NaN or infinite for 60 tokens, the first at sequence 0, token 1" in found.remarks[0]
    )


@pytest.mark.parametrize(
    "odd",
    [
        '"logps": [null, null], "old_logps": [-1, -2]',
        '"logps": [null, -1, -%d], "old_logps": [null, -1, -2]',
        '"logps": [], "old_logps": []',
        '"logps": -1, "old_logps": -1, "sequence": %d000000000000000000000',
        '"logps": -1, "old_logps": -1, "sequence": "2024-01-0%d"',
    ],
)
def test_what_pyarrow_takes_for_something_else_is_read_as_it_stands(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join('{"advantages": 1, ' + odd.replace("%d", str(i // 2 + 1)) + "}\n" for i in range(6))
    (tmp_path / "x.jsonl").write_text(text)
    found = list(open_log(tmp_path / "x.jsonl").parts())
    monkeypatch.setattr(token_sources, "by_pyarrow", lambda *_: None)
    want = list(open_log(tmp_path / "x.jsonl").parts())
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert all(torch.equal(a[k].nan_to_num(9), b[k].nan_to_num(9)) for k in b)
    if "sequence" in odd:
        assert sum(len(part["logps"]) for part in found) == 3


def test_a_line_may_be_longer_than_pyarrows_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jsonl, "_by_hand", lambda *_, **__: pytest.fail("read by hand"))
    long = [-1.2345678901234567] * 60_000  # 1.2 MB
    lines(tmp_path / "x.jsonl", [{"logps": long, "old_logps": long, "advantages": 1.0}] * 2)
    assert sum(int(part["mask"].sum()) for part in open_log(tmp_path / "x.jsonl").parts()) == 120_000


@pytest.mark.parametrize("rows", [records, tokens_of], ids=lambda f: f.__name__)
def test_lines_are_the_same_read_by_pyarrow_and_by_the_standard_library(
    rows: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_sources, "TEXT", 1500)  # several pieces
    by_hand: list[bytes] = []
    whole = Jsonl._by_hand
    monkeypatch.setattr(Jsonl, "_by_hand", lambda s, lines, *a, **k: by_hand.extend(lines) or whole(s, lines, *a, **k))
    lines(tmp_path / "x.jsonl", rows(arrays()))
    fast = list(open_log(tmp_path / "x.jsonl").parts())
    assert not by_hand
    (tmp_path / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text() + "\n")  # a blank line is odd
    list(open_log(tmp_path / "x.jsonl").parts())
    assert 0 < len(by_hand) < 1500
    monkeypatch.setattr(token_sources, "by_pyarrow", lambda *_: None)
    slow = list(open_log(tmp_path / "x.jsonl").parts())
    assert len(fast) == len(slow) > 0
    for a, b in zip(fast, slow, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---------------------------------------------------------------- what is no log


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def npz(**named: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **named)
    return out.getvalue()


def pt(x: Any) -> bytes:
    out = io.BytesIO()
    torch.save(x, out)
    return out.getvalue()


def table(**columns: Any) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def damaged(data: bytes) -> bytes:
    """One bit of the first array's values is another; headers are whole."""
    place = data.index(b"\n", data.index(b"NUMPY")) + 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


V = np.full(5, -1.0, np.float32)
M = np.full((5, 3), -1.0, np.float32)
TWO = np.array([2, 2])
N = torch.full((5, 3), -1.0)
GOOD = {"logps": V, "old_logps": V, "advantages": V}
BAD: dict[str, tuple[str, bytes, str]] = {
    "no such format": ("x.csv", b"a,b", "unknown format '.csv'; must be .npz, .pt, .pth, .bin, .jsonl, .parquet"),
    "no suffix": ("x", b"", r"unknown format '\(no suffix\)'"),
    "a suffix misspelt": ("x.jsonn", b"", "did you mean '.jsonl'?"),
    "no zip": ("x.npz", b"hello", "cannot be read as .npz"),
    "no torch file": ("x.pt", b"hello", "holds objects other than tensors|cannot be read"),
    "no parquet": ("x.parquet", b"hello", "cannot be read as .parquet"),
    "other fields": ("x.npz", npz(a=V, b=V), r"has the fields a, b; wanted: logps \(logps, per_token_logps, log_probs"),
    "one field missing": ("x.npz", npz(logps=V, old_logps=V), "has the fields logps, old_logps; wanted: advantages"),
    "trl's batch before the loss": (
        "x.pt", pt({"old_per_token_logps": N, "advantages": N[:, 0]}), "a batch is dumped before the loss makes them",
    ),
    "other lengths": ("x.npz", npz(**GOOD | {"old_logps": V[:4]}), r"old_logps has shape \(4,\), and logps \(5,\)"),
    "other shapes": (
        "x.npz", npz(logps=M, old_logps=M, advantages=V[:3]), r"advantages has shape \(3,\), and logps \(5, 3\)",
    ),
    "mask of another shape": ("x.npz", npz(logps=M, old_logps=M, advantages=V, mask=V), r"mask has shape \(5,\)"),
    "logits for logps": ("x.npz", npz(logps=M[None], old_logps=M[None], advantages=V), "of logits over a vocabulary"),
    "objects": ("x.npz", npz(**GOOD | {"logps": np.array([[1], [2, 3]], object)}), "logps holds objects: must be"),
    "text": ("x.npz", npz(**GOOD | {"logps": np.array(["a"] * 5)}), "logps holds <U1: must be numbers"),
    "lengths that do not add up": ("x.npz", npz(**GOOD, lengths=TWO), "lengths add up to 4, and logps has 5"),
    "lengths of other sequences": ("x.npz", npz(logps=M, old_logps=M, advantages=V, lengths=TWO), "one for each"),
    "no tensors": ("x.pt", pt([1, 2]), "must be a dict of tensors"),
    "objects in torch": ("x.pt", pt({"logps": N, "trap": Trap()}), r"write it with torch.save\(\{name: tensor"),
    "a pickle": ("x.pt", pickle.dumps(Trap()), "holds objects other than tensors"),
    "batches that differ": (
        "x.pt",
        pt([{"logps": N, "old_logps": N, "advantages": N, "mask": -N}, {"logps": N, "old_logps": N, "advantages": N}]),
        "mask is in other batches, and not in batch 2",
    ),
    "empty lines": ("x.jsonl", b"\n\n", "is empty; must hold a JSON object"),
    "ends in no json": ("x.jsonl", b'{"logps": -1, "old_logps": -1, "advantages": 1}\nhello\n', "line 2 is not JSON"),
    "no json": ("x.jsonl", b'{"logps": -1, "old_logps": -1, "advantages": 1}\nhello\n{}\n', "line 2 is not JSON"),
    "no object": ("x.jsonl", b'{"logps": -1, "old_logps": -1, "advantages": 1}\n7\n', "line 2: must be a JSON object"),
    "a line without a field": (
        "x.jsonl", b'{"logps": -1, "old_logps": -1, "advantages": 1}\n{"logps": -1}\n', "line 2 has no 'old_logps'",
    ),
    "words": (
        "x.jsonl", b'{"logps": 1, "old_logps": 1, "advantages": 1}\n{"logps": "x", "old_logps": 1, "advantages": 1}\n',
        "logps of record 2 is 'x': must be a number",
    ),
    "lists of other lengths": (
        "x.jsonl",
        b'{"logps": [-1], "old_logps": [-1], "advantages": 1}\n'
        b'{"logps": [-1], "old_logps": [-1, -1], "advantages": 1}\n',
        "old_logps of record 2 has 2 values, and logps 1",
    ),
    "a number for a list": (
        "x.jsonl", b'{"logps": [-1], "old_logps": -1, "advantages": 1}\n', "old_logps of record 1 has no list",
    ),
    "a list in one record alone": (
        "x.jsonl",
        b'{"logps": [-1], "old_logps": [-1], "advantages": 1}\n{"logps": -1, "old_logps": -1, "advantages": 1}\n',
        "logps of record 2 is no list, and that of others is",
    ),
    "a word in a list": (
        "x.jsonl",
        b'{"logps": [-1, -1], "old_logps": [-1, -1], "advantages": 1}\n'
        b'{"logps": [-1, -1], "old_logps": [-1, "x"], "advantages": 1}\n',
        "old_logps of record 2 is 'x'",
    ),
    "lists in lists": (
        "x.jsonl", b'{"logps": [[-1, -2]], "old_logps": [[-1, -2]], "advantages": 1}\n', r"record 1 is \[-1, -2",
    ),
    "a date": (
        "x.jsonl", b'{"logps": "2024-01-01", "old_logps": -1, "advantages": 1}\n', "logps of record 1 is '2024-01-01'",
    ),
    "dates in parquet": (
        "x.parquet", table(logps=np.array(["2024-01-01"], "datetime64[s]"), old_logps=V[:1], advantages=V[:1]),
        "logps of record 1 is .*2024.*: must be a number",
    ),
    "a number of hundreds of digits": (
        "x.jsonl", b'{"logps": null, "old_logps": -1, "advantages": 1}\n'
        b'{"logps": -1' + b"0" * 400 + b', "old_logps": -1, "advantages": 1}\n', "logps of record 2 is -1000",
    ),
    "a list for a sequence's name": (
        "x.jsonl", b'{"logps": -1, "old_logps": -1, "advantages": 1, "sequence": [1, 2]}\n', "sequence of record 1 is",
    ),
    "json after blank lines": (
        "x.jsonl", b'\n\n{"logps": -1, "old_logps": -1, "advantages": 1}\n\nhello\n{}\n', "line 5 is not JSON",
    ),
    "lines that are json only together": (
        "x.jsonl", b'\n{"logps": [-1], "old_logps": [-1], "advantages": 1}\n{"old_logps": [-1, -1], "advantages": 1, '
        b'"logps": [-1\n-1]}\n', "line 3 is not JSON",
    ),
    "brackets without end": (
        "x.jsonl", b'{"logps": -1, "old_logps": -1, "advantages": 1}\n' + b'{"x": ' * 10**5 + b"\n7\n",
        "line 2 is not JSON",
    ),
    "lists of other lengths in parquet": (
        "x.parquet", table(logps=[[-1.0], [-1.0]], old_logps=[[-1.0], [-1.0, -2.0]], advantages=[1.0, 1.0]),
        "old_logps of record 2 has 2 values",
    ),
    "no tokens": ("x.npz", npz(logps=V[:0], old_logps=V[:0], advantages=V[:0]), "no token to look at"),
    "lengths are one number": ("x.npz", npz(**GOOD, lengths=np.array(5)), r"lengths has shape \(\): must be"),
    "lengths are no whole numbers": ("x.npz", npz(**GOOD, lengths=TWO + 0.5), "lengths of sequence 0 is 2.5: must be"),
    "lengths beyond the padding": ("x.npz", npz(logps=M, old_logps=M, advantages=V, lengths=9 * V.astype(int) ** 2),
        "lengths of sequence 0 is 9: must be at most 3"),
    "mask of NaN": ("x.npz", npz(**GOOD, mask=V * np.nan), "5 values other than 0 and 1, the first, nan, at"),
    "mask with null": ("x.jsonl", b'{"logps": [-1, -1], "old_logps": [-1, -1], "advantages": 1, "mask": [1, null]}',
        "mask holds 1 values other than 0 and 1"),
    "no vocabulary": ("x.npz", npz(logps=M, old_logps=M, advantages=V, logits=np.zeros((5, 3, 0))), "logits has shape"),
    "a field that begins later": ("x.pt", pt([{"logps": N, "old_logps": N, "advantages": N},
        {"logps": N, "old_logps": N, "advantages": N, "mask": N + 2}]), "mask is in other batches, and not in batch 1"),
    "a field that begins in a later line": ("x.jsonl", b'{"logps": [-1], "old_logps": [-1], "advantages": 1}\n'
        b'{"logps": [-1], "old_logps": [-1], "advantages": 1, "mask": [0]}', "mask is in some lines, and not in"),
    "complex": ("x.pt", pt({"logps": N.cfloat(), "old_logps": N, "advantages": N}), "must be of plain real numbers"),
    "sparse": ("x.pt", pt({"logps": N.to_sparse(), "old_logps": N, "advantages": N}), "must be of plain real numbers"),
    "optional field of NaN": ("x.npz", npz(**GOOD, rewards=V * np.nan), "or leave rewards out"),
    "a damaged array": ("x.npz", damaged(npz(**GOOD)), "cannot be read as .npz \\(BadZipFile"),
    "lines without a token": ("x.jsonl", b'{"logps": [], "old_logps": [], "advantages": 1}', "no token to look at"),
    "mask of zeros": ("x.npz", npz(**GOOD, mask=np.zeros(5)), "mask is 0 everywhere"),
    "logits": ("x.npz", npz(**GOOD | {"logps": np.array([3, -1, 2, 0.5, -7.0])}), "these look like logits"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_log_is_said_in_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    name, data, says = BAD[what]
    (tmp_path / name).write_bytes(data)
    assert cli.main(["explain", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err), err
    assert str(tmp_path / name) in err


@pytest.mark.parametrize("kind", [">f4", ">f8", "longdouble"])
def test_numbers_of_another_byte_order_or_width_are_the_same(kind: str, tmp_path: Path) -> None:
    x = {"logps": M - np.arange(3), "old_logps": M, "advantages": np.arange(5.0)}
    np.savez(tmp_path / "x.npz", **{name: np.asarray(v, kind) for name, v in x.items()})
    (part,) = open_log(tmp_path / "x.npz").parts()
    assert all(np.array_equal(part[name].numpy(), v) for name, v in x.items())


def test_lists_of_padded_lines_end_where_their_lengths_say(tmp_path: Path) -> None:
    rows = [{"logps": [-1.0] * 5, "old_logps": [-1.0] * 5, "advantages": 1, "lengths": n} for n in (3, 5, 0, 1)]
    lines(tmp_path / "x.jsonl", rows)
    mask = torch.cat([part["mask"] for part in open_log(tmp_path / "x.jsonl").parts()])
    assert mask.sum(1).tolist() == [3, 5, 0, 1] and mask[0].tolist() == [True] * 3 + [False] * 2
    for n, says in ((2.5, "2.5: must be a whole"), (-1, "-1: must be a whole"), (6, "6: must be at most 5")):
        lines(tmp_path / "x.jsonl", [*rows, rows[0] | {"lengths": n}])
        with pytest.raises(ValueError, match=f"lengths of record 5 is {says}"):
            list(open_log(tmp_path / "x.jsonl").parts())


def test_sequences_whose_tokens_are_apart_are_noticed(tmp_path: Path) -> None:
    rows = [{"sequence": i % 4, "logps": -1.0, "old_logps": -1.5, "advantages": 1.0} for i in range(12)]
    for name, some, says in (("apart", rows, 1), ("sorted", sorted(rows, key=lambda x: x["sequence"]), 0)):
        lines(tmp_path / f"{name}.jsonl", some)
        log = open_log(tmp_path / f"{name}.jsonl")
        assert sum(len(part["logps"]) for part in log.parts()) == (12 if says else 4)
        assert sum("8 sequences have the name of an earlier one" in x for x in log.remarks) == says


def test_a_runs_folder_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "run.json").write_text(json.dumps({"clip": f"{tmp_path / 'evil.py'}:Clip"}))
    np.savez(tmp_path / "tokens.npz", **GOOD)
    assert cli.main(["explain", str(tmp_path)]) == 2 and "is code of the run's" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert cli.main(["explain", str(tmp_path), "--clip", "fixed"]) == 0
    (tmp_path / "run.json").write_text("[]")
    assert cli.main(["explain", str(tmp_path)]) == 2 and "is no JSON object" in capsys.readouterr().err


def test_a_page_does_not_replace_its_log_and_a_name_may_be_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", **GOOD)
    before = (tmp_path / "x.npz").read_bytes()
    assert cli.main(["explain", str(tmp_path / "x.npz"), "--html", str(tmp_path / "x.npz")]) == 2
    assert "is the log itself" in capsys.readouterr().err and (tmp_path / "x.npz").read_bytes() == before
    assert cli.main(["explain", "x" * 300]) == 2 == cli.main(["match", "--eps", ".2", "--tokens", "x" * 300])


def test_a_file_cut_short(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.save(out, V)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for name in GOOD:
            file.writestr(f"{name}.npy", out.getvalue()[:-4] if name == "logps" else out.getvalue())
    with pytest.raises(InputError, match="logps ends early"):
        list(open_log(tmp_path / "x.npz").parts())


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tokens.npz"):
        open_log(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        open_log(tmp_path / "x.npz")
    np.savez(tmp_path / "tokens.npz", **GOOD)  # type: ignore[arg-type]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json: is no JSON"):
        open_log(tmp_path)


def test_a_run_that_kept_no_token_says_whether_its_clip_is_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "tokens.npz", **{name: V[:0] for name in GOOD})  # type: ignore[arg-type]
    for rollout, says in (
        (2, r"idle? yes: one update a rollout (2 of each)"),
        (1, "no token whose ratio had left 1 in 2 steps"),
        (None, "metrics.jsonl has no step"),
    ):
        steps = [{"event": "step", "step": i + 1, "rollout": min(i + 1, rollout)} for i in range(2)] if rollout else []
        lines(tmp_path / "metrics.jsonl", steps)
        assert cli.main(["explain", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and says in err and str(tmp_path) in err


def test_a_run_whose_ratios_never_left_one_keeps_tokens_and_is_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    from bandpo.lab.trl.callbacks import TokenSampler

    def sampler(steps: range, kept: dict[str, np.ndarray], moved: int = 99) -> dict[str, np.ndarray]:
        keeper = TokenSampler(kept)
        keeper.thin(steps.start - 1, 4)
        for step in steps:
            old, advantages = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(step))
            new = -old.abs() - (0.1 if step == moved else 0.0)
            keeper.add(step, 1, 4, (new, -old.abs(), advantages), torch.ones(8, 20))
        return keeper.arrays()

    still = sampler(range(1, 5), {})
    assert np.array_equal(still["logps"], still["old_logps"]) and list(np.bincount(still["step"])) == [0, *[160] * 4]
    resumed = sampler(range(3, 5), sampler(range(1, 3), {}))
    assert all(np.array_equal(resumed[name], still[name]) for name in still)
    np.savez(tmp_path / "tokens.npz", **still)  # type: ignore[arg-type]
    assert cli.main(["explain", str(tmp_path)]) == 0
    assert "idle? yes: every ratio is exactly 1" in capsys.readouterr().out
    for before, steps in ((99, {3}), (2, {2, 3})):  # one that moved ends it
        assert set(sampler(range(3, 5), sampler(range(1, 3), {}, moved=before), moved=3)["step"]) == steps
    assert all(len(x) == 0 for x in TokenSampler({}).arrays().values())


def test_batches_of_different_widths_are_joined(tmp_path: Path) -> None:
    x = {
        k: torch.rand(3, 9).neg() if k != "advantages" else torch.randn(3) for k in ("logps", "old_logps", "advantages")
    }
    short = {k: v[:, :4] if v.dim() > 1 else v for k, v in x.items()}
    short["advantages"] = x["advantages"][:, None]
    torch.save([short, x, short], tmp_path / "x.pt")
    (part,) = open_log(tmp_path / "x.pt").parts()
    assert part["mask"].sum(-1).tolist() == [4] * 3 + [9] * 3 + [4] * 3
    torch.testing.assert_close(part["logps"][3:6], x["logps"])
    assert (part["advantages"][:3, 0] == x["advantages"]).all() and (part["old_logps"][:3, 4:] == 0).all()


def test_lengths_beside_a_mask_hold_too(tmp_path: Path) -> None:
    x = {k: -np.random.default_rng(0).random((3, 9), dtype=np.float32) for k in ("logps", "old_logps", "advantages")}
    mask = np.ones((3, 9), np.int64)
    mask[:, 0] = 0
    np.savez(tmp_path / "x.npz", **x, mask=mask, lengths=[2, 3, 9])
    (part,) = open_log(tmp_path / "x.npz").parts()
    assert part["mask"].sum(-1).tolist() == [1, 2, 8]
