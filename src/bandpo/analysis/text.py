"""An explanation as a text that a person reads in a minute."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

WIDTH = 110
NAMES = 44  # of a column of names
WHY = {
    "one_update": "yes: every ratio is exactly 1, as where a rollout feeds one update.",
    "no_advantage": "yes: every advantage is 0.",
    "no_clip": "yes: there is none.",
    "not_reached": "yes: no token went far enough.",
}
EQUAL = (("Band kl", "band_kl"), ("Band tv", "band_tv"), ("Band chi2", "band_chi2"), ("PPO eps", "fixed"))
BY = {
    "zero_gradient": "as many tokens ({share}) without gradient",
    "gradient_kept": "as much of the gradient ({share}) taken",
}


def as_text(found: dict[str, Any]) -> str:
    """Return the text.

    Args:
        found: `Explanation.to_dict()`.

    Returns:
        Lines of at most 110 characters.
    """
    parts = [_head(found), _effect(found), _divergence(found), _equivalent(found), _clips(found)]
    parts += [_rollout(found), _entropy(found), _said("Remarks", found["remarks"])]
    parts.append(_said("What to make of it", [f"{x['text']} [{x['page']}]" for x in found["advice"]]))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def percent(share: float | None) -> str:
    """Return a share for people: "12 %", "0.31 %", "-" for None."""
    return "-" if share is None else f"{100 * share:.3g} %"


def many(n: int, what: str) -> str:
    """Return how many, for people: "1 token", "2,048 tokens"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def number(x: float | None) -> str:
    """Return a number for people."""
    return "-" if x is None else f"{x:.3g}"


def nearly(same: dict[str, Any], keys: Sequence[str] = tuple(dict(EQUAL).values())) -> str:
    """Return "nearly " where one of an `Explanation.equivalent` misses its share by more than 2 %, else ""."""
    missed = any(same[key] and abs(same[key]["share"] - same["share"]) > 0.02 * same["share"] for key in keys)
    return "nearly " if missed else ""


def why_none(same: dict[str, Any]) -> str:
    """Return why an `Explanation.equivalent` names no radius, in words."""
    if same["by"] is None:
        return "no token has moved in the direction of its advantage"
    return f"no bound of the ratio {'changes gradients as this clip' if same['by'] == 'other' else 'takes as much'}"


def taken(same: dict[str, Any]) -> str:
    """Return what an `Explanation.equivalent` takes, in words."""
    return nearly(same) + BY[same["by"]].format(share=percent(same["share"]))


def measured(clip: dict[str, Any]) -> str:
    """Return from which old policy all but an anchored clip is measured, as a heading says it; "" without an anchor."""
    return "" if clip["anchor"] == "old" else f", from old_logps, not by anchor={clip['anchor']}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines whose columns are flush: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in (head, *rows)
    ]


def _head(found: dict[str, Any]) -> list[str]:
    n, clip, idle = found["counts"], found["clip"], found["idle"]
    where = "" if n["sequences"] is None else f" in {many(n['sequences'], 'sequence')}"
    signs = f"A > 0 {percent(n['positive'])}, A < 0 {percent(n['negative'])}, A = 0 {percent(n['zero'])}"
    ratio = f"ratio exactly 1: {percent(idle['ratio_one'])}; beyond 2x: {percent(idle['ratio_beyond_2x'])}"
    acts = WHY.get(idle["why"], "no.")
    return [
        f"{many(n['tokens'], 'token')}{where}; {signs}",
        f"mean of -log p {number(n['surprise'])} nats; {ratio}; largest |log r| {number(idle['largest_log_ratio'])}",
        f"clip {clip['name']}: {clip['is']}",
        f"idle? {acts}",
    ]


def _effect(found: dict[str, Any]) -> list[str]:
    cells = {(row["bucket"], row["sign"]): row for row in found["effect"]}
    groups = ("", "", "", "no gradient", "", "", "gradient kept", "", "", "")
    head = ("old probability", "tokens", "outside", "all", "A > 0", "A < 0", "all", "A > 0", "A < 0", "opposed")
    rows = []
    for bucket in dict.fromkeys(row["bucket"] for row in found["effect"]):
        every, up, down = (cells[bucket, sign] for sign in ("all", "positive", "negative"))
        if not every["tokens"]:
            continue
        outside = every["outside_below"] + every["outside_above"] + every["capped"]
        shares = [every["share"], outside, every["zero_grad"], up["zero_grad"], down["zero_grad"]]
        shares += [every["gradient_kept"], up["gradient_kept"], down["gradient_kept"], every["gradient_opposed"]]
        rows.append((_bucket(bucket), *map(percent, shares)))
    return ["What the clip does", *table(groups, [head, *rows])]


def _divergence(found: dict[str, Any]) -> list[str]:
    head = (f"Divergence reached, a token{measured(found['clip'])}", "mean", "99th percentile", "largest")
    lines = table(head, [(name, *(number(x) for x in row.values())) for name, row in found["divergence"].items()])
    if (whole := found["sequence"]) is not None:
        lines.append(
            f"KL(old || new) of a sequence, estimated: mean {number(whole['kl_mean'])}, largest "
            f"{number(whole['kl_max'])} nats"
        )
    return lines


def _equivalent(found: dict[str, Any]) -> list[str]:
    same, where = found["equivalent"], measured(found["clip"])
    known = [(name, same[key]) for name, key in EQUAL if same[key] is not None]
    if not known:
        return [f"Equal to this clip here{where}: {why_none(same)}"]
    if same["by"] is None:
        title = f"Equal to this clip here{where}: it took nothing, and so does anything of at least"
    else:
        title = f"Equal to this clip here{where}: {taken(same)} with"
    values = ", ".join(f"{name} {number(x['value'])}" for name, x in known)
    return [title, f"  {values}; DPPO's delta is Band's, kl and tv"]


def _clips(found: dict[str, Any]) -> list[str]:
    known = [row for row in found["clips"] if row["missing"] is None]
    if not known:
        return []
    dh = any(row["entropy"] is not None for row in known)
    keys = ("zero_grad", "zero_grad_rare", "gradient_kept", "gradient_opposed")
    alike: dict[tuple[str, ...], list[str]] = {}  # what cannot be told apart is one row
    for row in known:
        cells = (*(percent(row[key]) for key in keys), *([number(row["entropy"])] if dh else []))
        alike.setdefault(cells, []).append(row["clip"])
    rows = []
    for cells, names in alike.items():
        first, *more = textwrap.wrap(", ".join(names), NAMES)
        rows += [(first, *cells), *((line, *[""] * len(cells)) for line in more)]
    head = ("clip", "no gradient", "rare, A > 0", "kept", "opposed", *(["dH"] if dh else []))
    few = f"rare: p < 0.1; {found['counts']['rare']:,} tokens with A > 0"
    where = measured(found["clip"])
    title = f"What each clip would do to these tokens{where}, with its published defaults ({few})"
    lines = [*textwrap.wrap(title, WIDTH), *table(head, rows)]
    lacks: dict[str, list[str]] = {}
    for row in found["clips"]:
        if row["missing"]:
            lacks.setdefault(row["missing"], []).append(row["clip"])
    return lines + [
        line for need, names in lacks.items() for line in _wrap(f"not known without {need}: {', '.join(names)}")
    ]


def _rollout(found: dict[str, Any]) -> list[str]:
    gap = found["rollout"]
    if gap is None:
        return []
    keys = ("k3", "beyond_2x", "effective_sample_size")
    head = ("Rollout engine against trainer", "tokens", "k3, nats", "beyond 2x", "effective sample size")
    rows = [
        (name, f"{row['tokens']:,}", number(row[keys[0]]), percent(row[keys[1]]), f"{row[keys[2]]:.3f}")
        for name, row in [("all", gap), *((_bucket(x["bucket"]), x) for x in gap["by_bucket"])]
    ]
    whole = gap["sequence_effective_sample_size"]
    said = [] if whole is None else [f"effective sample size of whole sequences: {whole:.3f}"]
    return [*table(head, rows), *said]


def _entropy(found: dict[str, Any]) -> list[str]:
    names = {"logit_step": "plain gradient step on the logits", "natural_gradient": "natural-gradient estimate"}
    forms = found["entropy"]
    if forms is None:
        return []
    head = ("Entropy to first order, nats a token for a step of 1", "this clip", "A > 0", "A < 0", "no clip")
    keys = ("clip", "clip_positive", "clip_negative", "no_clip")
    return table(head, [(names[k], *(f"{v[key]:+.3g}" for key in keys)) for k, v in forms.items() if v is not None])


def _bucket(name: str) -> str:
    return name.removeprefix("p").replace("-", " to ")


def _said(title: str, sentences: Sequence[str]) -> list[str]:
    return [title, *(line for x in sentences for line in _wrap(f"- {x}"))] if sentences else []


def _wrap(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
