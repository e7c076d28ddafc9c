"""What people write, read: YAML files and the words of a command line. Nothing heavy is imported here."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from bandpo._input import InputError, nearest

MOST_BYTES, MOST_DEPTH, MOST_NODES = 1_000_000, 32, 20_000  # of a recipe; far above any that means something
HYDRA = re.compile(r"(\+\+?)?[A-Za-z_][\w.@/-]*=|~[A-Za-z_]")


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it stands in its file: its name, its keys, and those that `--smoke` changes; not checked yet."""

    name: str
    keys: dict[str, Any]
    smoke: dict[str, Any] = field(default_factory=dict)


@dataclass
class Words:
    """A command line, read.

    Attributes:
        plain: values of keys without a dot, and of keys that were given without a value, True.
        nested: values of keys that reach inside a mapping, by the mapping's name.
        hydra: words ``key=value``, as they were given.
    """

    plain: dict[str, Any] = field(default_factory=dict)
    nested: dict[str, dict[str, Any]] = field(default_factory=dict)
    hydra: list[str] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """YAML as version 1.2 reads it (1e-4 is a number, `no` and a date are words), and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            wrong = "a key must be a word" if not isinstance(key.value, str) else f"key {key.value[:80]!r} twice"
            if not isinstance(key.value, str) or key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, wrong, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_WORDS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag not in _WORDS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), list(_first))


def read_yaml(text: str, source: str) -> Any:
    """Return what YAML says; `source` is what it is, for the message.

    Raises:
        InputError: it is not YAML, or nested or repeated beyond all sense; names the line.
    """
    try:
        found = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise InputError(f"{source}: is nested too deeply, more than {MOST_DEPTH} levels; flatten it") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise InputError(f"{source}: not valid YAML:{where} {what}; mend it") from None
    left = [(found, 0)]
    for count, (node, depth) in enumerate(left):  # an alias counts wherever it stands
        if depth > MOST_DEPTH or count > MOST_NODES:
            raise InputError(f"{source}: is nested too deeply or repeats itself without end; write it out")
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, (list, set, tuple)) else ()
        left.extend((x, depth + 1) for x in inner)
    return found


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with bandpo."""
    return sorted(Path(str(f)).stem for f in (files("bandpo") / "recipes").iterdir() if str(f).endswith(".yaml"))


def read_recipe(name_or_path: str) -> RecipeFile:
    """Find a recipe by its name, or a YAML file, and read its keys, not checked yet.

    Raises:
        InputError: no such recipe or file, not YAML, not a mapping.
    """
    names, path = recipe_names(), Path(name_or_path)
    shipped = files("bandpo") / "recipes" / f"{name_or_path}.yaml"
    try:
        if name_or_path not in names and not path.is_file():
            raise FileNotFoundError
        if name_or_path not in names and path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        text = (shipped if name_or_path in names else path).read_text("utf-8")
    except FileNotFoundError:
        hint = nearest(name_or_path, names) or nearest(path.stem, names)
        raise InputError(
            f"no recipe {name_or_path[:200]!r}{hint}: give the path of a YAML file that exists, or a name: "
            f"{', '.join(names)}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, or a NUL in the path
        raise InputError(f"recipe {name_or_path[:200]!r}: cannot be read as text ({error}); give a YAML file") from None
    keys = read_yaml(text, f"recipe {name_or_path}")
    if not isinstance(keys, dict) or not keys:
        raise InputError(f"recipe {name_or_path}: must be a YAML mapping of keys to values, such as 'task: addition'")
    smoke = {} if (said := keys.pop("smoke", None)) is None else said
    if not isinstance(smoke, dict):
        raise InputError(f"recipe {name_or_path}: smoke={smoke!r}: must be a mapping of keys to small values")
    return RecipeFile(path.stem, {str(key): value for key, value in keys.items()}, smoke)


def read_words(words: Sequence[str], *, typed: Collection[str], flags: Collection[str], hydra: bool) -> Words:
    """Read a command line: ``--key value``, ``--key=value``, ``--mapping.key value``, ``--flag``, ``--no_flag``.

    Args:
        words: what was given.
        typed: keys whose value is YAML; those of all others stay text, for whoever knows their types.
        flags: keys that are true or false, so that what follows them may be another word.
        hydra: whether words ``key=value`` are taken.

    Returns:
        The keys, "-" in their names replaced by "_".

    Raises:
        InputError: a word belongs to no key, or a key inside a mapping lacks its value.
    """
    found, rest = Words(), list(words)
    while rest:
        word = _clean(rest.pop(0))
        if hydra and HYDRA.match(word):
            found.hydra.append(word)
            continue
        if not word.startswith("--") or len(word) < 3:
            raise InputError(
                f"{word[:200]!r} belongs to no key; write --key value or --key=value"
                + (", or key=value for a key of verl's own" if hydra else "")
            )
        key, equals, value = word[2:].partition("=")
        outer, dot, inner = key.partition(".")
        outer = outer.replace("-", "_")
        alone = (
            not rest
            or rest[0].startswith("--")
            or (outer in flags and not re.match(r"(?i)(true|false|null)$", rest[0]))
        )
        if dot and (not inner or (alone and not equals)):
            raise InputError(f"--{key}: needs a value, as in --{outer}.{inner or 'name'} 0.02")
        if not equals and alone:
            no = outer.removeprefix("no_")
            found.plain[no] = no == outer
            continue
        value = value if equals else _clean(rest.pop(0))
        if dot:
            read = value if outer == "trl" else read_yaml(value, f"--{key}")
            _put(found.nested.setdefault(outer, {}), inner, read, flat=outer == "verl")
        else:
            found.plain[outer] = read_yaml(value, f"--{key}") if outer in typed else value
    return found


def _put(mapping: dict[str, Any], key: str, value: Any, *, flat: bool) -> None:
    """Set ``a.b`` inside a mapping; verl's own keys keep their dots."""
    *outer, last = [key] if flat else key.split(".")
    for name in outer:
        inner = mapping.setdefault(name, {})
        if not isinstance(inner, dict):
            raise InputError(f"{name}: is given a value and a key inside it ({key}); give one of them")
        mapping = inner
    mapping[last] = value


def _clean(word: str) -> str:
    """A word that a file can hold."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{ascii(word)[:200]}: is not text (not UTF-8); write it anew") from None
    return word
