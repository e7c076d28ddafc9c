"""What every command's parser shares."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from bandpo._input import InputError, nearest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors that name the nearest choice, and that abbreviates nothing."""

    def __init__(self, *args: Any, **named: Any) -> None:
        """Take what ArgumentParser takes."""
        named |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **named)

    def error(self, message: str) -> NoReturn:
        """Raise the message as an InputError."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[^\s,']+", found[2]))
        raise InputError(f"{message}; see {self.prog} --help")


def finish(parser: argparse.ArgumentParser, handler: Callable[[argparse.Namespace], int | None]) -> None:
    """Give a command's parser ``--json`` and its handler."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=handler, parser=parser)


def refuse(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """Raise for a word that the parser does not know, naming the nearest option."""
    options = [option for action in parser._actions for option in action.option_strings]
    if not word.startswith("--h"):  # --delta is no misspelt --help
        options.remove("--help")
    word = word.split("=")[0]
    raise InputError(f"{word}: {parser.prog} does not take it{nearest(word, options)}; see {parser.prog} --help")
