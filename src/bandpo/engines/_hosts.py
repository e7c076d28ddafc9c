"""The frameworks that have an adapter: which versions fit, how to get one, and errors that say both."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bandpo._input import InputError


def installed_version(package: str) -> str | None:
    """Return the version of an installed package.

    Args:
        package: its name on the index.

    Returns:
        The version; None when it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Host:
    """A framework that an adapter hooks into.

    Args:
        package: its name as a distribution.
        allows: the versions that may be installed, as in the package's requirements.
        way: how to install one of them.
        tried: the oldest and the newest version that the adapter's tests ran on, or None.
        part: a further package without which it is no engine, or None.
        plugs: whether it loads the adapter by itself as it is imported, through an entry point.
    """

    package: str
    allows: str
    way: str
    tried: tuple[str, str] | None = None
    part: str | None = None
    plugs: bool = False

    @property
    def fits(self) -> str:
        """The versions allowed and those tested, in words."""
        tested = self.tried and f", tested with {self.package}=={_in_words(self.tried)}"
        return self.allows + (tested or "")

    def version(self) -> str | None:
        """Return the version installed; None where the framework, or its part, is not."""
        found = installed_version(self.package)
        return found if self.part is None or installed_version(self.part) else None

    def complaint(self, finding: str) -> str:
        """Return one line: the version found, what is the matter, what is allowed and the way out.

        Args:
            finding: what is the matter.

        Returns:
            The line.
        """
        found = self.version()
        label = f"{self.package}=={found}" if found else f"{self.package} (no version found)"
        return f"{label}: {finding}; must be {self.fits}: {self.way}"

    def error(self, finding: str) -> InputError:
        """Return the error of a framework that does not fit; see `complaint`."""
        return InputError(self.complaint(finding))

    @contextmanager
    def imports(self) -> Iterator[None]:
        """Import from the framework inside; an ImportError then says how to get a version that fits."""
        try:
            yield
        except ImportError as error:
            raise type(error)(self.complaint(str(error)), name=error.name) from error

    def find(self, owner: Any, name: str) -> Any:
        """Return what the framework's module or class `owner` has under `name`.

        Args:
            owner: a module or class.
            name: of a function.

        Returns:
            The function.

        Raises:
            InputError: there is none.
        """
        if not hasattr(owner, name):
            raise self.error(f"its {owner.__name__} has no {name} any more, where the clip goes")
        return getattr(owner, name)

    def check_source(self, owner: Any, name: str, parts: tuple[str, ...]) -> None:
        """Raise unless the source of a function holds what the adapter relies on; how it is laid out does not matter.

        Args:
            owner: a module or class.
            name: of its function.
            parts: pieces of the function's source.

        Raises:
            InputError: the function or a part of it is gone.
        """
        source = "".join(inspect.getsource(self.find(owner, name)).split())
        for part in parts:
            if "".join(part.split()) not in source:
                raise self.error(f"its {name} no longer holds `{part}`, where the clip goes")


LOSS_MODE = "bandpo"  # the loss's name in verl, and its configuration's place: for those who may not import verl
TARGET = "bandpo.engines.verl.BandLossConfig"
_EXTRA = "pip install '.[{}]' in a checkout of bandpo"
HOSTS = {  # by the adapter's name; what was tried stands in docs/versions.md
    "trl": Host("trl", "trl>=1.10", _EXTRA.format("trl"), ("1.10.0", "1.16.0")),
    "verl": Host(
        "verl", "verl>=0.9.1,<0.10", f"{_EXTRA.format('verl')}, in an environment of its own", ("0.9.1", "0.9.1"),
        plugs=True,
    ),
    "torchrl": Host("torchrl", "torchrl>=0.14.1", _EXTRA.format("torchrl"), ("0.14.1", "0.14.1")),
    "rllib": Host("ray", "ray[rllib]>=2.56", _EXTRA.format("ray"), ("2.56.0", "2.60.0"), part="gymnasium"),
    "tinker": Host("tinker", "tinker>=0.38", _EXTRA.format("tinker"), ("0.38.0", "0.38.0")),
    "skyrl": Host(
        "skyrl", "skyrl>=0.4,<0.5, tested with skyrl==0.4.0", "pip install 'skyrl==0.4.0' on Python 3.12 or newer"
    ),
    "prime_rl": Host(
        "prime-rl", "a commit with LossInputs and LossOutputs, read in 559b447",
        "pip install 'git+https://github.com/PrimeIntellect-ai/prime-rl'",
    ),
    "slime": Host(
        "slime", "slime 0.3.1 or newer, read in commit 00c2d6d",
        "pip install 'git+https://github.com/THUDM/slime' (the index has another slime)",
    ),
}  # fmt: skip
# What the adapters stand on, as far as it was tried: a version outside is no error, `bandpo doctor` says it.
TRIED = {"torch": ("2.6.0", "2.14.1"), "transformers": ("5.3.0", "5.24.0")}
TRIED_PYTHON = ("3.11", "3.13")


def untried(package: str, found: str, tried: tuple[str, str]) -> str | None:
    """Say that a version lies outside those that were tried.

    Args:
        package: its name.
        found: the version installed.
        tried: the oldest and the newest tried.

    Returns:
        One line, or None where it lies between them. The numbers of the shorter version decide.
    """
    oldest, newest = map(_numbers, tried)
    number = _numbers(found)
    older, newer = number < oldest[: len(number)], number[: len(newest)] > newest
    if not older and not newer:
        return None
    return f"{package} {found} is {'older' if older else 'newer'} than those tried ({_in_words(tried)})"


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: of 2.13.0+cpu, 1.16.0.dev0 or 5.0.0rc1 its leading numbers."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _in_words(tried: tuple[str, str]) -> str:
    return tried[0] if tried[0] == tried[1] else f"{tried[0]} to {tried[1]}"
