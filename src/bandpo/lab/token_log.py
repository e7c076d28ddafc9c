"""Logs of tokens as files: ours, TRL's and verl's names, whole sequences a part at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.analysis.explain import Explainer
from bandpo.analysis.explanation import Explanation
from bandpo.analysis.sanity import check_mask
from bandpo.lab.token_sources import FORMATS, Block, Npz, Source, broken, open_source

PART = 1 << 17  # tokens read at a time
# what `bandpo.explain` calls it: what files call it (ours, TRL's, verl's)
NAMES: dict[str, tuple[str, ...]] = {
    "logps": ("logps", "per_token_logps", "log_probs", "log_prob"),
    "old_logps": ("old_logps", "old_per_token_logps", "old_log_probs", "old_log_prob"),
    "advantages": ("advantages",),
    "mask": ("mask", "completion_mask", "response_mask", "loss_mask"),
    "tool_mask": ("tool_mask",),
    "rollout_logps": ("rollout_logps", "sampling_per_token_logps", "rollout_log_probs"),
    "entropies": ("entropies", "entropy", "entropys"),
    "rewards": ("rewards",),
    "state_divergence": ("state_divergence",),
    "logits": ("logits",),
    "sequence": ("sequence",),
    "lengths": ("lengths",),
}
MOST_NAMES = 1 << 19  # of sequences that are remembered
WANTED = ("logps", "old_logps", "advantages")


@dataclass
class TokenLog:
    """A log of tokens, found but not read.

    Args:
        path: the file.
        fields: the file's name of each field, by ours.
        source: reads them.
        assumed: what had to be assumed about the fields.
        clip: name and arguments of the clip in use, where the log says so.
    """

    path: Path
    fields: dict[str, str]
    source: Source
    assumed: list[str] = field(default_factory=list)
    clip: tuple[str, dict[str, Any]] | None = None

    @property
    def remarks(self) -> list[str]:
        """What had to be assumed, and what was met while reading."""
        return [*self.assumed, *self.source.remarks]

    def parts(self, batch: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield the arguments of `Explainer.update`, whole sequences at a time.

        Args:
            batch: how many sequences in a part, or None for as many as make 131,072 tokens; where the log does not say
                which tokens belong together, how many tokens.

        Yields:
            Tensors by name, (batch, token), or (token,) where the sequences are not known.

        Raises:
            InputError: a field has the wrong shape, length or type.
        """
        blocks = _whole_sequences(self._blocks(batch), batch, self.source.remarks)
        for block in _joined(blocks) if batch is None else blocks:
            part = {name: torch.tensor(x) for name, x in block.items()}
            part = {name: x if name == "mask" or x.is_floating_point() else x.float() for name, x in part.items()}
            if (tool := part.pop("tool_mask", None)) is not None:
                part["mask"] = tool != 0 if "mask" not in part else (part["mask"] != 0) & (tool != 0)
            part.setdefault("old_logps", part["logps"])
            yield part

    def explained(self, explainer: Explainer, batch: int | None = None) -> Explanation:
        """Show the whole log to an `Explainer`, and return what it found.

        Args:
            explainer: a new one.
            batch: as in `parts`.

        Returns:
            The explanation, with the remarks of reading.

        Raises:
            InputError: as `parts` and `Explainer`; names the file.
        """
        try:
            for part in self.parts(batch):
                explainer.update(**part)
            explainer.remarks += self.remarks
            return explainer.compute()
        except InputError as error:
            raise InputError(f"{self.path}: {str(error).removeprefix(f'{self.path}: ')}") from None

    def _blocks(self, batch: int | None) -> Iterator[Block]:
        """Yield what the source reads, where it can be what its names say."""
        seen = 0
        for block in _guarded(self.path, self.source.blocks(self.fields, PART, batch)):
            for name in ("mask", "tool_mask"):
                if name in block:
                    check_mask(self.fields.get(name, name), torch.tensor(block[name]), seen)
            seen += len(block["logps"])
            if late := [name for name in self.source.later if any(name in names for names in NAMES.values())]:
                raise InputError(f"{late[0]} is in some lines, and not in the first: must be in all, or in none")
            yield block


def open_log(path: Path) -> TokenLog:
    """Find the fields of a log.

    Args:
        path: a .npz, .pt (or .pth, .bin), .jsonl or .parquet file, or the folder of a run of `bandpo train`.

    Returns:
        `TokenLog`.

    Raises:
        InputError: no such file, an unknown format, or a field is missing; names those found and wanted. A run that
            kept no token: says whether its clip is idle.
    """
    clip, file, formats = None, path, ", ".join(FORMATS)
    if os.path.isdir(path):  # unlike Path's own, it raises for no name
        clip, file = _run_clip(path), path / "tokens.npz"
        if not file.is_file():
            raise InputError(
                f"{path}: the folder holds no tokens.npz; give the --out folder of a `bandpo train`, or a file "
                f"({formats})"
            )
    if not os.path.isfile(file):
        raise InputError(f"{path}: no such file; give a file ({formats}) or a run's folder")
    source = open_source(file)
    fields = {ours: name for ours, names in NAMES.items() for name in reversed(names) if name in source.names}
    log = TokenLog(path, fields, source, clip=clip)
    for names in NAMES.values():
        if len(twice := [name for name in names if name in source.names]) > 1:
            log.assumed.append(f"{' and '.join(twice)} are the same field: {twice[0]} is used")
    missing = [name for name in WANTED if name not in fields]
    if missing == ["old_logps"] and "completion_mask" in source.names:
        log.assumed.append(
            "old_per_token_logps is not there: TRL leaves it out where a rollout feeds one update, so every ratio is 1"
        )
    elif missing:
        wanted = "; ".join(f"{name} ({', '.join(NAMES[name])})" for name in missing)
        raise InputError(
            f"{path}: has the fields {', '.join(source.names) or 'none'}; wanted: {wanted}{_hint(missing, fields)}"
        )
    if path.is_dir() and isinstance(source, Npz) and source.shape(fields["logps"])[:1] == (0,):
        raise InputError(f"{path}: {_why_none(path)}")
    return log


def _why_none(folder: Path) -> str:
    """Say why a run kept no token, of which its trainer shows none where each rollout feeds one update."""
    from bandpo.lab.run.records import Step, read_records

    steps = [x for x in read_records(folder / "metrics.jsonl", []) if isinstance(x, Step)]
    if steps and steps[-1].rollout >= steps[-1].step:
        return (
            f"idle? yes: one update a rollout ({steps[-1].step:,} of each), so that every ratio was exactly 1, no clip "
            "could act, and no token was kept; make several (steps_per_generation above gradient_accumulation_steps)"
        )
    made = f"in {steps[-1].step:,} steps" if steps else "and metrics.jsonl has no step"
    return f"the run kept no token whose ratio had left 1 {made}; let it make more steps"


def _hint(missing: list[str], fields: dict[str, str]) -> str:
    if missing == ["logps"] and fields.get("old_logps", "old_logps") != "old_logps":
        return "; a batch is dumped before the loss makes them: add those of the policy in training"
    return ""


def _run_clip(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the clip that a run's folder names."""
    file = folder / "run.json"
    if not file.is_file():
        return None
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is no JSON ({error}); mend it, or give tokens.npz itself") from None
    if not isinstance(info, dict):
        raise InputError(f"{file}: is no JSON object; mend it, or give tokens.npz itself")
    name, args = info.get("clip"), info.get("clip_args") or {}
    return (name, args) if isinstance(name, str) and name != "host" and isinstance(args, dict) else None


def _whole_sequences(blocks: Iterator[Block], batch: int | None, remarks: list[str]) -> Iterator[Block]:
    """Pad tokens that say to which sequence they belong; hold back the last part of a block, which may go on."""
    held: Block = {}
    seen: set[Any] = set()
    again: list[Any] = []
    for block in blocks:
        if "sequence" not in block or block["logps"].ndim > 1:
            block.pop("sequence", None)
            yield block
            continue
        block = {name: np.concatenate([held[name], x]) for name, x in block.items()} if held else block
        starts = _starts(block["sequence"])
        *_, (last, _) = _groups(np.diff(np.append(starts, len(block["logps"]))), batch)
        keep = starts[last]
        held = {name: x[keep:] for name, x in block.items()}
        _note_again(block["sequence"][starts[starts < keep]].tolist(), seen, again)
        yield from _padded({name: x[:keep] for name, x in block.items()}, batch)
    if held and len(held["logps"]):
        _note_again(held["sequence"][_starts(held["sequence"])].tolist(), seen, again)
        yield from _padded(held, batch)
    if again:
        remarks.append(
            f"{len(again):,} sequences have the name of an earlier one that others follow, the first {again[0]!r}, and "
            "count as new ones: where they are the same, sort the rows by sequence"
        )


def _joined(blocks: Iterator[Block]) -> Iterator[Block]:
    """Join padded blocks, as many as make no more than `PART` tokens with their padding: few take less time."""
    held: list[Block] = []
    rows = width = 0
    for block in blocks:
        shape = block["logps"].shape
        alone = len(shape) != 2 or "logits" in block
        if held and (alone or (rows + shape[0]) * max(width, shape[1]) > PART):
            yield _stacked(held, width)
            held, rows, width = [], 0, 0
        if alone:
            yield block
        else:
            held.append(block)
            rows, width = rows + shape[0], max(width, shape[1])
    if held:
        yield _stacked(held, width)


def _stacked(blocks: list[Block], width: int) -> Block:
    """Pad blocks to one width, and put one below the other; what has a number a sequence gets it for every token."""
    if len(blocks) == 1:
        return blocks[0]
    if any(block["logps"].shape[1] < width for block in blocks):  # then there must be a mask
        blocks = [{"mask": np.ones(block["logps"].shape, bool)} | block for block in blocks]
    rows: list[Block] = []
    for block in blocks:
        shape = block["logps"].shape
        full = {name: np.broadcast_to(x.reshape(len(x), -1), shape) for name, x in block.items()}
        rows.append({name: np.pad(x, ((0, 0), (0, width - shape[1]))) for name, x in full.items()})
    return {name: np.concatenate([block[name] for block in rows]) for name in rows[0]}


def _guarded(path: Path, blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield blocks; a file that breaks half-way is one line, as one that breaks where it begins."""
    try:
        yield from blocks
    except InputError:
        raise
    except Exception as error:
        raise broken(path, error) from None


def _note_again(names: list[Any], seen: set[Any], again: list[Any]) -> None:
    """Note the names that have been there before."""
    for name in names if len(seen) < MOST_NAMES else ():
        if name in seen:
            again.append(name)
        seen.add(name)


def _starts(sequence: np.ndarray) -> np.ndarray:
    """Return where each sequence begins."""
    return np.concatenate([[0], np.flatnonzero(sequence[1:] != sequence[:-1]) + 1])


def _padded(flat: Block, batch: int | None) -> Iterator[Block]:
    """Yield sequences as padded rows: `batch` at a time, or as many as make no more than `PART` with their padding."""
    if len(flat["logps"]) == 0:
        return
    starts = _starts(flat.pop("sequence"))
    lengths = np.diff(np.append(starts, len(flat["logps"])))
    own = flat.pop("mask", None)
    for first, last in _groups(lengths, batch):
        some, begin = lengths[first:last], starts[first]
        mask = np.arange(some.max()) < some[:, None]
        rows: Block = {}
        for name, x in flat.items():
            rows[name] = np.zeros(mask.shape, x.dtype)
            rows[name][mask] = x[begin : begin + some.sum()]
        rows["mask"] = mask.copy()
        if own is not None:
            rows["mask"][mask] = own[begin : begin + some.sum()] != 0
        yield rows


def _groups(lengths: np.ndarray, batch: int | None) -> Iterator[tuple[int, int]]:
    first, widest = 0, 0
    for i, length in enumerate(lengths):
        widest = max(widest, int(length))
        if i > first and (i - first >= batch if batch else (i + 1 - first) * widest > PART):
            yield first, i
            first, widest = i, int(length)
    yield first, len(lengths)
