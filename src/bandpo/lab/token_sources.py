"""Where logs of tokens lie: one class a format, each read a part at a time. Nothing is unpickled."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bandpo._input import InputError, nearest
from bandpo.lab import token_values as values
from bandpo.lab.arrow import Columns, as_numpy, by_pyarrow

Block = dict[str, np.ndarray]  # by our names: logps (batch, token), or (token,) with or without `sequence`
PER_SEQUENCE = ("advantages", "rewards")  # may be one number a sequence
TEXT = 4 << 20  # bytes of JSON lines parsed at a time
ROWS = 256  # rows of lists taken at a time from a parquet file


class Source(Protocol):
    """A log whose fields are known and whose values are read when they are asked for."""

    names: list[str]
    remarks: list[str]
    later: set[str]  # fields met while reading that `names` has not

    def blocks(self, fields: Mapping[str, str], size: int, batch: int | None) -> Iterator[Block]:
        """Yield blocks of about `size` tokens; of padded arrays, `batch` sequences at a time."""


def open_source(path: Path) -> Source:
    """Return the source for a file's suffix.

    Args:
        path: a file that is there.

    Returns:
        The source.

    Raises:
        InputError: an unknown suffix, or a file that is not what its suffix says.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{path}: unknown format {path.suffix or '(no suffix)'!r}; must be {', '.join(FORMATS)}"
            f"{nearest(path.suffix, FORMATS)}"
        )
    try:
        return kind(path)
    except InputError:
        raise
    except Exception as error:  # broken files make readers fail in every way
        raise broken(path, error) from None


def broken(path: Path, error: Exception) -> InputError:
    """Return what to say of a file that a reader failed on."""
    why = f"{type(error).__name__}: {values.short(error)}"
    return InputError(f"{path}: cannot be read as {path.suffix} ({why}); write it again")


class _Arrays:
    """Named arrays, all of one batch."""

    names: list[str]

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.later: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def reader(self, name: str) -> Any:
        """Return a function of n that gives the next n rows."""
        raise NotImplementedError

    def blocks(self, fields: Mapping[str, str], size: int, batch: int | None) -> Iterator[Block]:
        """Yield rows of the arrays."""
        base = self.shape(fields["logps"])
        if len(base) not in (1, 2):
            raise InputError(
                f"{fields['logps']} has shape {base}: must be (batch, token) or (token,); of logits over a vocabulary "
                "give torch.log_softmax(logits, -1) of the taken tokens"
            )
        if len(base) == 2:
            fields = {ours: name for ours, name in fields.items() if ours != "sequence"}
        lengths = self._lengths(fields, base)
        self._check(fields, base, None if lengths is None else len(lengths))
        take = {ours: self.reader(name) for ours, name in fields.items() if ours != "lengths"}
        if len(base) == 2:
            rows = batch or max(1, size // max(base[1], 1) // (8 if "logits" in fields else 1))
        else:
            rows = batch if batch and lengths is None and "sequence" not in fields else size
        whole = {
            ours: np.repeat(take.pop(ours)(len(lengths)).reshape(-1), lengths)
            for ours in PER_SEQUENCE
            if lengths is not None and len(base) == 1 and ours in fields and self._few(fields[ours], base, lengths)
        }
        ids = None if lengths is None or len(base) == 2 else np.repeat(np.arange(len(lengths)), lengths)
        for i in range(0, base[0], rows):
            n = min(rows, base[0] - i)
            block = {ours: read(n) for ours, read in take.items()} | {k: x[i : i + n] for k, x in whole.items()}
            if ids is not None:
                block["sequence"] = ids[i : i + n]
            if lengths is not None and len(base) == 2:
                inside = np.arange(base[1]) < lengths[i : i + n, None]
                block["mask"] = block["mask"] * inside if "mask" in block else inside
            yield block

    def _few(self, name: str, base: tuple[int, ...], lengths: np.ndarray) -> bool:
        """Whether a field of a flat log has one number a sequence."""
        return self.shape(name) != base and self.shape(name)[:1] == (len(lengths),)

    def _lengths(self, fields: Mapping[str, str], base: tuple[int, ...]) -> np.ndarray | None:
        if "lengths" not in fields:
            return None
        shape = self.shape(name := fields["lengths"])
        if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
            raise InputError(f"{name} has shape {shape}: must be (sequences,), the number of tokens of each")
        lengths = values.whole(name, "sequence", self.reader(name)(shape[0]).reshape(-1))
        if len(base) == 1 and lengths.sum() != base[0]:
            raise InputError(
                f"lengths add up to {lengths.sum():,}, and logps has {base[0]:,} tokens: must be the number of tokens "
                "of each sequence, in order"
            )
        if len(base) == 2 and len(lengths) != base[0]:
            raise InputError(f"lengths has {len(lengths):,} values: must be one for each of the {base[0]:,} sequences")
        if len(base) == 2 and len(lengths) and lengths.max() > base[1]:
            at = int(lengths.argmax())
            raise InputError(f"{name} of sequence {at} is {lengths[at]:,}: must be at most {base[1]:,}, logps' tokens")
        return lengths

    def _check(self, fields: Mapping[str, str], base: tuple[int, ...], sequences: int | None) -> None:
        """Raise for a field whose shape does not fit to that of logps."""
        for ours, name in fields.items():
            shape, fits = self.shape(name), [base]
            if ours == "lengths":
                continue
            if ours in PER_SEQUENCE and len(base) == 2:
                fits += [base[:1], (base[0], 1)]
            if ours in PER_SEQUENCE and len(base) == 1 and sequences is not None:
                fits += [(sequences,), (sequences, 1)]
            if (shape[:-1] if ours == "logits" else shape) not in fits:
                allowed = " or ".join(map(str, fits))
                raise InputError(
                    f"{name} has shape {shape}, and {fields['logps']} {base}: must be {allowed}"
                    f"{' and the vocabulary' if ours == 'logits' else ''}; write both from the same tokens"
                )


class Npz(_Arrays):
    """A numpy archive; each array is a stream, so that none is ever whole in memory."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = zipfile.ZipFile(path)
        self.members = {name.removesuffix(".npy"): name for name in self.file.namelist()}
        self.names = list(self.members)

    def _open(self, name: str) -> tuple[Any, tuple[int, ...], bool, np.dtype]:
        stream = self.file.open(self.members[name])
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject or dtype.kind not in "biuf":
            raise InputError(
                f"{name} holds {'objects' if dtype.hasobject else dtype}: must be numbers; pad the sequences to one "
                "length and give a mask, or write them one after the other and give their lengths"
            )
        return stream, shape, fortran, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape from the header alone."""
        return self._open(name)[1]

    def reader(self, name: str) -> Any:
        """Return a function of n that reads the next n rows of the stream."""
        stream, shape, fortran, dtype = self._open(name)
        width, own = math.prod(shape[1:]), values.native(dtype)
        if fortran and len(shape) > 1:
            whole = np.frombuffer(stream.read(), dtype).astype(own).reshape(shape, order="F")
            rest = iter(whole)
            return lambda n: np.stack(list(itertools.islice(rest, n)))

        def take(n: int) -> np.ndarray:
            data = stream.read(n * width * dtype.itemsize)
            if len(data) != n * width * dtype.itemsize:
                raise InputError(f"{name} ends early: the file is cut short; write it again")
            return np.frombuffer(data, dtype).astype(own, copy=False).reshape(n, *shape[1:])

        return take


class Torch(_Arrays):
    """A dict of tensors, as `torch.save` wrote it, or a list of such dicts; read with `weights_only`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle's protocol
                # the old format is no zip file, and cannot be mapped
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: holds objects other than tensors, which could run code when they are read: write it with "
                "torch.save({name: tensor, ...}), for verl torch.save(dict(data.batch), path)"
            ) from None
        dicts = found if isinstance(found, list) else [found]
        if not dicts or not all(isinstance(x, Mapping) for x in dicts):
            raise InputError(f"{path}: holds a {type(found).__name__}: must be a dict of tensors, or a list of these")
        flat = [{**x, **x["batch"]} if isinstance(x.get("batch"), Mapping) else dict(x) for x in dicts]
        self.dicts = [{k: v for k, v in x.items() if isinstance(k, str) and isinstance(v, torch.Tensor)} for x in flat]
        self.names = list(dict.fromkeys(name for x in self.dicts for name in x))
        self.now = self.dicts[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape."""
        if name not in self.now:
            at = next(i for i, x in enumerate(self.dicts, 1) if x is self.now)
            raise InputError(f"{name} is in other batches, and not in batch {at}: must be in all, or in none")
        return tuple(self.now[name].shape)

    def reader(self, name: str) -> Any:
        """Return a function of n that gives the next n rows."""
        x, done = self.now[name], 0
        if x.is_nested:
            raise InputError(f"{name} is a nested tensor: must be padded; write torch.nested.to_padded_tensor(x, 0.0)")
        if x.layout != torch.strided or x.is_complex() or x.is_quantized or x.device.type != "cpu":
            kind = f"{x.dtype}, {x.layout}, on {x.device}"
            raise InputError(f"{name} is a tensor of {kind}: must be of plain real numbers; write x.to_dense().float()")

        def take(n: int) -> np.ndarray:
            nonlocal done
            piece = x[done : done + n].detach()
            done += n
            wide = piece.dtype in (torch.float32, torch.float64) or not piece.is_floating_point()
            return (piece if wide else piece.float()).contiguous().numpy()

        return take

    def blocks(self, fields: Mapping[str, str], size: int, batch: int | None) -> Iterator[Block]:
        """Yield rows of each dict in turn."""
        for batch_dict in self.dicts:
            self.now = batch_dict
            yield from super().blocks(fields, size, batch)


class _Rows:
    """Records: a sequence with a list for each field, or a token with a number for each field."""

    names: list[str]
    dtype: np.dtype | None = None  # of all numbers, or None: their own

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.later: set[str] = set()
        self.seen = 0

    def tables(self, names: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
        """Yield some records at a time, as a list (of numbers or of lists) or an array for each field."""
        raise NotImplementedError

    def blocks(self, fields: Mapping[str, str], size: int, batch: int | None) -> Iterator[Block]:
        """Yield the tokens of some records at a time, one after the other."""
        for table in self.tables(list(fields.values()), size):
            columns = {ours: table[name] for ours, name in fields.items()}
            own, n = columns.pop("lengths", None), len(columns["logps"])
            if n:
                yield self._lists(columns, own) if values.is_lists(columns["logps"]) else self._numbers(columns)
            self.seen += n

    def _lists(self, columns: dict[str, Any], used: Any = None) -> Block:
        lengths = values.lengths_of(columns["logps"])
        own_records = np.arange(self.seen, self.seen + len(lengths))
        if (lengths < 0).any():
            row = self.seen + int((lengths < 0).argmax()) + 1
            raise InputError(f"logps of record {row} is no list, and that of others is: must be a list in every one")
        block: Block = {"sequence": np.repeat(own_records, lengths)}
        for name, column in columns.items():
            if name == "sequence":
                continue
            if not values.is_lists(column) and name in PER_SEQUENCE:
                block[name] = np.repeat(values.floats(name, column, own_records, self.dtype), lengths)
                continue
            if ((own := values.lengths_of(column)) != lengths).any():
                row = int((own != lengths).argmax())
                raise InputError(
                    f"{name} of record {self.seen + row + 1} has {own[row] if own[row] >= 0 else 'no list of'} values, "
                    f"and logps {lengths[row]}: must be as many"
                )
            flat = np.concatenate(column) if isinstance(column[0], np.ndarray) else list(itertools.chain(*column))
            block[name] = values.floats(name, flat, block["sequence"], self.dtype)
        if used is not None:  # lists may be padded too
            ends = self._ends(used, lengths, own_records)
            place = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
            inside = place < np.repeat(ends, lengths)
            block["mask"] = block["mask"] * inside if "mask" in block else inside
        return block

    def _ends(self, used: Any, lengths: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Return how many values of each list are tokens."""
        ends = values.whole("lengths", "record", values.floats("lengths", used, records, self.dtype), self.seen + 1)
        if (ends > lengths).any():
            at = int((ends > lengths).argmax())
            raise InputError(
                f"lengths of record {self.seen + at + 1} is {ends[at]:,}: must be at most {lengths[at]:,}, the values "
                "of its logps"
            )
        return ends

    def _numbers(self, columns: dict[str, Any]) -> Block:
        records = np.arange(self.seen, self.seen + len(columns["logps"]))
        return {
            name: values.ids(x, records) if name == "sequence" else values.floats(name, x, records, self.dtype)
            for name, x in columns.items()
        }


class Jsonl(_Rows):
    """JSON lines, of numbers that count as float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        with path.open("rb") as file:
            first = next(([numbered] for numbered in enumerate(file, 1) if numbered[1].strip()), None)
        if not first:
            raise InputError(f"{path}: is empty; must hold a JSON object on each line")
        self.names = list(self._parse(first, cut=False)[0])

    def _parse(self, numbered: list[tuple[int, bytes]], cut: bool) -> list[dict[str, Any]]:
        """Parse lines at once, which is several times as fast as one by one; one by one to find what is wrong."""
        try:
            found = json.loads(b"[%s]" % b",".join(line for _, line in numbered))
        except (ValueError, RecursionError):
            found = []
        if len(found) != len(numbered):  # what is JSON only together, such as a list broken by a line's end, counts not
            found = []
            for number, line in numbered:
                try:
                    found.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    if cut and number == numbered[-1][0]:
                        self.remarks.append(f"line {number} is cut short, and left out")
                        break
                    raise InputError(f"{self.path}: line {number} is not JSON ({error}); mend it") from None
        bad = next((i for i, x in enumerate(found) if not isinstance(x, dict)), None)
        if bad is not None:
            raise InputError(f"{self.path}: line {numbered[bad][0]}: must be a JSON object with a field for each value")
        return found

    def tables(self, names: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
        """Yield the records of some megabytes of lines at a time."""
        with self.path.open("rb") as file:
            start = 1
            while text := file.read(TEXT) + file.readline():
                ends = text.endswith(b"\n")  # a line that a kill cut short does not
                lines = text.count(b"\n") + (not ends)
                table, fields = by_pyarrow(text, lines, names) or self._by_hand(
                    text.split(b"\n"), names, start, cut=not ends
                )
                self.later |= fields - set(self.names)
                yield table
                start += lines

    def _by_hand(self, lines: list[bytes], names: Sequence[str], start: int, cut: bool) -> Columns:
        """Return the columns and fields of lines by the standard library, which also says what is wrong with them."""
        numbered = [(start + i, line) for i, line in enumerate(lines) if line.strip()]
        records = self._parse(numbered, cut) if numbered else []
        try:
            return {name: [record[name] for record in records] for name in names}, set().union(*records)
        except KeyError as error:
            row = next(i for i, record in enumerate(records) if error.args[0] not in record)
            raise InputError(f"{self.path}: line {numbered[row][0]} has no {error}: every line must have it") from None


class Parquet(_Rows):
    """A parquet file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import pyarrow.parquet as pq  # type: ignore[import-untyped]
        except ImportError:
            raise InputError(f"{path}: a .parquet file needs pyarrow: pip install pyarrow, or write .npz") from None
        self.file = pq.ParquetFile(path)
        self.names = list(self.file.schema_arrow.names)

    def tables(self, names: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a batch at a time."""
        import pyarrow.types as types  # type: ignore[import-untyped]

        kinds = [self.file.schema_arrow.field(name).type for name in names]
        lists = any(types.is_list(k) or types.is_large_list(k) or types.is_fixed_size_list(k) for k in kinds)
        for batch in self.file.iter_batches(ROWS if lists else size, columns=list(dict.fromkeys(names))):
            yield {name: as_numpy(batch.column(name)) for name in names}


FORMATS: dict[str, Any] = {
    ".npz": Npz, ".pt": Torch, ".pth": Torch, ".bin": Torch, ".jsonl": Jsonl, ".parquet": Parquet,
}  # fmt: skip
