"""Reading a model's text: which part of it is the answer. Nothing here evaluates anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""What TRL hands to a reward function: text, or chat messages."""

NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:(?<=\d)[eE][-+−]?\d+)?(?!\w)")
# What stands before a number that is part of a calculation: "4 + ", "x^", "a - ", but not "is -".
CALCULATED = re.compile(r"(?:[\d)}\]]\s*[-+−*/^×÷·]|\w\s*[+*/^×÷·]|\w[-−]|\w\s{1,9}[-−]\s)[-+−*/^×÷·\s]{0,99}$|\}\{$")
BOLD = re.compile(r"\*\*(?=\S)(.*?)(?<=\S)\*\*")
LONGEST = 20_000  # characters: more than an answer has, and few enough to read in a moment
OPEN, CLOSE = "<answer>", "</answer>"


def answer_text(completion: Completion) -> str:
    """The text to grade: of a conversation, the assistant's last turn, "" for none; what tools said is no answer."""
    if isinstance(completion, str):
        return completion
    turns = [message for message in completion if message.get("role", "assistant") == "assistant"]
    return _content_text(turns[-1].get("content")) if turns else ""


def _content_text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, Mapping) else {"type": "text", "text": part} for part in content]
    return "".join(str(part.get("text") or "") for part in parts if part.get("type", "text") in ("text", "output_text"))


def tagged(text: str) -> str | None:
    """What stands between the last <answer> and </answer>, without blanks around it, or None."""
    start = text.rfind(OPEN, 0, max(text.rfind(CLOSE), 0))  # no pattern: many <answer> would take it minutes
    return None if start < 0 else text[start + len(OPEN) : text.index(CLOSE, start)].strip()


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, braces balanced; None when there is no box or it never closes."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    opened = text.index("{", start)
    depth = 0
    for i in range(opened, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[opened + 1 : i].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number of a text, such as "-7", "1,024", "0.5" or "9.36e-18", as Python writes it.

    None when it is part of a calculation: "4 + 3" is a sum that was not worked out.
    """
    text = BOLD.sub(r"\1", text[-LONGEST:])
    found = [match for match in NUMBER.finditer(text) if match[0]]
    if not found or CALCULATED.search(before := text[: found[-1].start()]):
        return None
    sign = "-" if before.endswith(("-", "−")) else ""
    return sign + found[-1][0].replace(",", "").replace("−", "-")
