"""Values of a log of tokens as arrays: numbers, names of sequences, lengths; what is none of these is named."""

from __future__ import annotations

from typing import Any

import numpy as np

from bandpo._input import InputError


def native(dtype: np.dtype) -> np.dtype:
    """Return the type of a file's numbers as PyTorch has it: of this machine's byte order, 64 bits at most."""
    return np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")


def is_lists(column: Any) -> bool:
    """Return whether a column holds a list for each record."""
    return len(column) > 0 and isinstance(column[0], (list, np.ndarray))


def lengths_of(column: Any) -> np.ndarray:
    """Return the length of each list, -1 for what is none."""
    return np.array([len(x) if isinstance(x, (list, np.ndarray)) else -1 for x in column])


def ids(values: Any, records: np.ndarray) -> np.ndarray:
    """Return what names the sequences as an array.

    Args:
        values: of a column.
        records: from 0, the record of each, for messages.

    Raises:
        InputError: a value is neither a number nor a word.
    """
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values
    bad = next((i for i, x in enumerate(values) if isinstance(x, (list, dict, np.ndarray))), None)
    if bad is not None:
        found = short(repr(values[bad]))
        raise InputError(f"sequence of record {records[bad] + 1} is {found}: must be a number or a word")
    return np.asarray(values)


def floats(name: str, values: Any, records: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Return numbers as an array, null as NaN.

    Args:
        name: of the field, for messages.
        values: of a column.
        records: from 0, the record of each, for messages.
        dtype: of the array, or None: the numbers' own if they are of a floating type, else float32.

    Raises:
        InputError: a value is no number.
    """
    own = values.dtype if isinstance(values, np.ndarray) and values.dtype.kind == "f" else np.dtype(np.float32)
    try:
        found = np.array(values, dtype=dtype or own)
        if found.ndim == 1 and not (isinstance(values, np.ndarray) and values.dtype.kind in "mM"):
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    bad = next((i for i, x in enumerate(values) if not _is_number(x)), 0)
    raise InputError(f"{name} of record {records[bad] + 1} is {short(repr(values[bad]))}: must be a number")


def whole(name: str, what: str, given: np.ndarray, first: int = 0) -> np.ndarray:
    """Return numbers of tokens as integers.

    Args:
        name: of the field, for messages.
        what: what has so many tokens, for messages.
        given: the numbers.
        first: the number of the first `what`.

    Raises:
        InputError: a number is not whole, or below 0.
    """
    good = np.isfinite(given) & (given >= 0) & (given == np.floor(given))
    if not good.all():
        at = int((~good).argmax())
        raise InputError(f"{name} of {what} {first + at} is {given[at]:g}: must be a whole number of tokens, 0 or more")
    return given.astype(np.int64)


def short(said: object) -> str:
    """Return what is said in one line of 120 characters at most."""
    return " ".join(str(said).split())[:120]


def _is_number(x: Any) -> bool:
    try:
        return np.array(x, np.float32).ndim == 0
    except (TypeError, ValueError, OverflowError):  # the last: a whole number of hundreds of digits
        return False
