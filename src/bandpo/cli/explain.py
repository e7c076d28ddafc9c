"""`bandpo explain`: what a clip does to logged tokens."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError, is_import_path
from bandpo.cli._clip import add_clip, clip_args
from bandpo.cli._log import log_path
from bandpo.cli._parser import finish

if TYPE_CHECKING:
    from bandpo.clips.base import Clip
    from bandpo.lab.token_log import TokenLog


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explain",
        help="say what a clip does to logged tokens",
        description="Read a log of tokens and say what the clip in use does to them: whether it is idle, what it\n"
        "takes and from which tokens, which other clip would take as much, how far the rollout engine is from\n"
        "the trainer, where the entropy goes, and what to make of it.",
        epilog="examples:\n  bandpo explain example --clip clip_higher\n"
        "  bandpo explain tokens.npz --clip band --clip_args.delta 0.02 --html tokens.html",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help=".npz, .pt, .jsonl, .parquet, a run's folder, or 'example', which ships with bandpo",
    )
    add_clip(parser, "the run's own where the folder knows it, else PPO's 0.2 / 0.2")
    parser.add_argument("--anchor", default="old", help="old policy the clip measures from: old, p, r or both")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="sequences that a clip which looks at the batch sees at once"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too")
    finish(parser, _explain)


def _explain(args: argparse.Namespace) -> None:
    from bandpo.analysis.explain import Explainer
    from bandpo.lab.token_log import open_log

    given = clip_args(args)
    if args.clip is None and given:
        raise InputError(f"--clip_args {given}: must come with --clip NAME; name the clip")
    log = open_log(log_path(args.file))
    clip, given = (args.clip, given) if args.clip else log.clip or ("fixed", {})
    if not args.clip and is_import_path(clip):
        raise InputError(f"{args.file}: its clip {clip} is code of the run's: give --clip {clip} to run it, or another")
    if args.html and os.path.exists(args.html) and os.path.samefile(args.html, log.path):
        raise InputError(f"--html {args.html}: is the log itself, which would be lost; name another file")
    explainer = Explainer(clip, clip_args=given, anchor=args.anchor, batch=args.batch)
    _check_needs(explainer.clip, args, log)
    found = log.explained(explainer, args.batch)
    result = {"file": str(args.file), "fields": log.fields, **found.to_dict()}
    if args.html:
        from bandpo.lab.explain_page import write_page

        result["html"] = str(write_page(found, str(args.file), args.html, _command(args, given)))
    print(json.dumps(result) if args.json else "\n\n".join([_found(args, log), str(found), *_drawn(result)]))


def _check_needs(clip: Clip, args: argparse.Namespace, log: TokenLog) -> None:
    """Raise for a clip that looks at what the log does not hold."""
    missing = [name for name in clip.needs if name not in log.fields]
    if args.anchor != "old" and missing == ["rollout_logps"]:
        raise InputError(
            f"--anchor {args.anchor}: {log.path} has no field rollout_logps; log it, or leave --anchor out"
        )
    if missing:
        raise InputError(
            f"clip {clip.name!r}: {log.path} has no field {', '.join(missing)}; log it, or name another clip"
        )


def _found(args: argparse.Namespace, log: TokenLog) -> str:
    fields = ", ".join(ours if ours == name else f"{ours} ({name})" for ours, name in log.fields.items())
    assumed = "" if args.clip or log.clip else "; the clip is PPO's 0.2 / 0.2, name yours with --clip"
    return f"{args.file}: {fields}{assumed}"


def _command(args: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    words = ["explain", args.file, *(["--clip", args.clip] if args.clip else [])]
    words += ["--clip_args", json.dumps(given)] if args.clip and given else []
    words += [] if args.anchor == "old" else ["--anchor", args.anchor]
    words += ["--batch", str(args.batch)] if args.batch else []
    return [*words, "--html", str(args.html)]


def _drawn(result: dict[str, Any]) -> list[str]:
    return [f"written: {result['html']}"] if "html" in result else []
