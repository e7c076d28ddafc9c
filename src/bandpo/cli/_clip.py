"""The words that name a clip, shared by commands: ``--clip NAME --clip_args.delta 0.05``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from bandpo._input import InputError
from bandpo.cli._parser import refuse


def add_clip(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--clip`` and ``--clip_args``; what they leave over goes to `clip_args`.

    Args:
        parser: of the command.
        default: what stands for no ``--clip``, for the help text.
    """
    parser.add_argument("--clip", metavar="NAME", help=f"a name of bandpo.list_clips(), or an import path; {default}")
    parser.add_argument(
        "--clip_args", metavar="JSON", help='its arguments, {"delta": 0.05}, or one by one: --clip_args.delta 0.05'
    )
    parser.set_defaults(overrides=[])


def clip_args(args: argparse.Namespace) -> dict[str, Any]:
    """Return the clip's arguments from the command line.

    Args:
        args: the namespace; `overrides` holds the words that the parser left over.

    Returns:
        The arguments.

    Raises:
        InputError: no JSON object, a word that is no argument of a clip, or one without a value.
    """
    found: dict[str, Any] = {}
    if args.clip_args is not None:
        found = _json(args.clip_args)
        if not isinstance(found, dict):
            raise InputError(f"--clip_args {args.clip_args!r}: must be a JSON object, such as '{{\"delta\": 0.05}}'")
    words = [word for given in args.overrides for word in _split(given)]
    while words:
        key = words.pop(0)
        if not key.startswith("--clip_args."):
            refuse(args.parser, key)
        if not words:
            raise InputError(f"{key}: has no value; write {key} VALUE")
        _put(found, key.removeprefix("--clip_args.").split("."), _json(words.pop(0)))
    return found


def _split(word: str) -> Sequence[str]:
    return word.split("=", 1) if word.startswith("--") else [word]


def _put(where: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        where = where.setdefault(key, {})
    where[path[-1]] = value


def _json(text: str) -> Any:
    """Return what a word means as JSON; a word that is none is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text
