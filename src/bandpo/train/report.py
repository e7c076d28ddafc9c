"""The report of one or several runs: one HTML page that needs neither network nor any other file."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from bandpo._input import InputError
from bandpo.plots import need_matplotlib
from bandpo.train.history import Run, by_arm, clip_label, number, read_runs

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body><main>
{body}
<footer>Written by bandpo. Everything on this page is in this file.</footer>
</main>
<script>
for (const button of document.querySelectorAll(".copy button")) {{
  button.addEventListener("click", async () => {{
    const text = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(text);
    try {{ await navigator.clipboard.writeText(text.textContent); }} catch {{ document.execCommand("copy"); }}
    button.textContent = "copied";
  }});
}}
</script>
</body>
</html>
"""
REGION_TEXT = """<p>Each dot is a token that was trained on, at its probability under the old policy and the ratio by
which the policy had moved it. Shaded: where the clip lets a token move; dashed: the limit r = 1/p. Both ends of the
axis of p are opened up. Tokens whose ratio was exactly 1 are left out; tokens beyond the frame are drawn on it.</p>"""
BUCKET_TEXT = (
    "Share of the bucket's tokens over the whole run: upwards A > 0 beyond the upper bound, downwards (paler) A < 0 "
    "beyond the lower bound."
)
KINDS = {
    "inside": "inside: full gradient",
    "up": "above and A > 0: zero gradient",
    "down": "below and A < 0: zero gradient",
    "inward": "outside, moving back: full gradient",
}


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about some runs.

    Args:
        runs: output folders of ``bandpo train``; the first one is what the headline is about.
        out: the file to write; a file that is there is replaced.

    Returns:
        The path of the page.

    Raises:
        InputError: a folder holds no run, `out` cannot be written, or matplotlib is missing.
    """
    need_matplotlib()
    page = render(read_runs([Path(run) for run in runs]))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name a file in a folder that exists") from None
    return out


def render(runs: Sequence[Run]) -> str:
    """Return the page about some runs as HTML.

    Args:
        runs: what was read; the first one is what the headline is about.

    Returns:
        A whole HTML document.
    """
    first = runs[0]
    sections = [_header(first), _headline(first), _measured(runs), _missing(runs)]
    if len(runs) > 1:
        sections.append(_arms(runs))
    sections += [_curves(runs), _clip(runs), _samples(runs), _repeat(runs)]
    css = importlib.resources.files("bandpo.lab.page").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{_task(first)} with {first.name}: bandpo report"
    return PAGE.format(title=escape(title), css=css, body="\n".join(section for section in sections if section))


# ---------------------------------------------------------------- the top of the page


def _header(run: Run) -> str:
    info = run.info
    facts = [f"model {info['model']}" if "model" in info else "", f"seed {info['seed']}" if "seed" in info else ""]
    if run.steps:
        rollouts = len({record.get("rollout") for record in run.steps} - {None})
        updates = f"{run.steps[-1]['step']:,} optimiser steps"
        facts.append(f"{rollouts:,} rollouts, {updates}" if rollouts else updates)
    if _finite(info.get("seconds")):
        facts.append(_duration(info["seconds"]))
    if "engine" in info:
        facts.append(f"{info['engine']}, {info.get('workers', '?')} workers")
    return (
        f"<h1>{escape(_task(run))}, trained with {escape(run.name)}</h1>"
        f'<p class="kicker">{escape(" · ".join(fact for fact in facts if fact))}</p>'
    )


def _headline(run: Run) -> str:
    before, after = run.before, run.after
    shown = f'<span class="from">{_percent(before.get("accuracy"))} →</span> {_percent(after.get("accuracy"))}'
    intervals = f"95 % intervals {_interval(before)} and {_interval(after)}"
    counts = {f"{e['n']:,}" for e in (before, after) if _finite(e.get("n"))}
    if counts:
        intervals += f"; {' and '.join(sorted(counts))} completions to held-out prompts each time"
    clipped = _mean(run, "clipped")
    label, first, last = "Entropy, nats a token", before.get("entropy"), after.get("entropy")
    if first is None and last is None and run.steps:  # verl's evaluations have none
        label, first, last = f"{label}, training", run.steps[0].get("entropy"), run.steps[-1].get("entropy")
    record = "rollout" if "engine" in run.info else "update"  # verl logs the mean over a rollout's updates
    facts = [
        (label, f"{_number(first)} → {_number(last)}"),
        ("Tokens with zero gradient, mean", _percent(clipped, 2)),
        (f"Highest in one {record}", _percent(_highest(run, "clipped"), 2)),
    ]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f'<div class="headline"><div class="card"><div class="label">Held-out accuracy, before → after</div>'
        f'<div class="big">{shown}</div><div class="label">{escape(intervals)}</div></div>'
        f'<dl class="card facts">{rows}</dl></div>'
    )


def _measured(runs: Sequence[Run]) -> str:
    """Say what the numbers are, and what they are not."""
    run, said = runs[0], []
    before, after = run.before, run.after
    status = run.info.get("status")
    if status not in (None, "done"):
        error = f": {run.info['error']}" if run.info.get("error") else ""
        said.append(f"This run has not ended; its status is {status}{error}.")
    if all(_finite(e.get(k)) for e in (before, after) for k in ("accuracy", "low", "high")):
        apart = after["low"] > before["high"] or after["high"] < before["low"]
        verdict = "do not overlap" if apart else "overlap"
        change = "went up" if after["accuracy"] > before["accuracy"] else "did not go up"
        said.append(
            f"Held-out accuracy {change}; the intervals of before and after {verdict}. They cover the draw of "
            "prompts and completions, not another seed or another training run."
        )
    seeds: dict[str, set[str]] = {}
    for r in runs:
        seeds.setdefault(repr((r.info.get("clip"), r.info.get("clip_args"))), set()).add(str(r.info.get("seed")))
    if len(seeds) > 1 and min(map(len, seeds.values())) < 2:
        said.append(
            "A clip with one seed only: a difference between such arms may be chance and proves nothing about the "
            "clips. Repeat every arm with several seeds before drawing a conclusion."
        )
    elif len(seeds) > 1:
        said.append(
            f"{min(map(len, seeds.values()))} seeds an arm at least; this page draws each run and tests nothing."
        )
    else:
        said.append("Nothing here compares this clip with another one.")
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in said)


def _missing(runs: Sequence[Run]) -> str:
    items = [f"{run.name}: {sentence}" if len(runs) > 1 else sentence for run in runs for sentence in run.missing]
    if not items:
        return ""
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<div class="note"><p>Not everything could be shown:</p><ul>{listed}</ul></div>'


def _arms(runs: Sequence[Run]) -> str:
    head = ["run", "seed", "before", "after", "highest on the way", "entropy after", "zero gradient", "time", "status"]
    rows = []
    for run in runs:
        before, after = run.before, run.after
        between = [e["accuracy"] for e in run.evaluations() if _finite(e.get("accuracy"))]
        cells = [
            str(run.info.get("seed", "–")),
            f"{_percent(before.get('accuracy'))}\n{_interval(before)}",
            f"{_percent(after.get('accuracy'))}\n{_interval(after)}",
            _percent(max(between, default=None)),
            _number(after.get("entropy")),
            _percent(_mean(run, "clipped"), 2),
            _duration(run.info.get("seconds")),
            str(run.info.get("status", "–")),
        ]
        numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        rows.append(f'<tr><td class="name">{_chip(run.arm)}{escape(run.name)}</td>{numbers}</tr>')
    header = f"<th>{head[0]}</th>" + "".join(f'<th class="n">{name}</th>' for name in head[1:])
    return f"<h2>The runs side by side</h2>{_table(header, rows)}"


# ---------------------------------------------------------------- figures


def _curves(runs: Sequence[Run]) -> str:
    from bandpo.train import figures

    def of(key: str) -> Callable[[dict[str, Any]], float]:
        return lambda record: number(record, key)

    panels = [
        ("Reward", figures.curves(runs, "Reward", of("reward")), "Mean training reward of each rollout."),
        (
            "Held-out accuracy",
            figures.accuracy(runs),
            "Prompts that training never sees; the band is the 95 % interval.",
        ),
        ("Entropy", figures.curves(runs, "Entropy", of("entropy")), "Mean entropy of the next token, in nats."),
        (
            "Zero-gradient share",
            figures.curves(runs, "Zero-gradient share", of("clipped"), percent=True),
            "Tokens that the clip left without gradient, mean over each rollout's updates.",
        ),
        (
            "… above the upper bound",
            figures.curves(runs, "Clipped above", of("clip/zero_grad_above"), percent=True),
            "The part with A > 0 and r > high.",
        ),
        (
            "… below the lower bound",
            figures.curves(runs, "Clipped below", of("clip/zero_grad_below"), percent=True),
            "The part with A < 0 and r < low.",
        ),
    ]
    drawn = "".join(_figure(*panel) for panel in panels)
    smoothed = max((figures.smooth(figures.by_rollout(run, of("reward"))[1])[1] for run in runs), default=1)
    note = f"Thin lines: each rollout. Bold lines: running mean over {smoothed} rollouts." if smoothed > 1 else ""
    return f'<h2>Training</h2>{_key(runs)}<p class="muted">{note}</p><div class="grid">{drawn}</div>'


def _clip(runs: Sequence[Run]) -> str:
    from bandpo.train import figures

    firsts = [arm[0] for arm in by_arm(runs)]
    left, reach = figures.frame(firsts)
    parts = [part for run in firsts if (part := _region(run, left, reach))]
    text = REGION_TEXT if parts else ""
    if parts:
        dots = [
            f'<li><i class="dot" style="background:{figures.DOTS[k]}"></i>{escape(v)}</li>' for k, v in KINDS.items()
        ]
        text += f'<ul class="key">{"".join(dots)}</ul>'
    bars = figures.buckets(runs)
    if bars:
        parts.append(_figure("Zero-gradient share by old probability", bars, BUCKET_TEXT))
    return f'<h2>The clip and the tokens it saw</h2>{text}<div class="grid">{"".join(parts)}</div>' if parts else ""


def _region(run: Run, left: float, reach: float) -> str | None:
    from bandpo.train import figures

    try:
        drawn = figures.region(run, left, reach)
    except (InputError, TypeError) as error:
        return _figure(run.name, None, f"This clip cannot be drawn here: {error}.")
    if drawn is None:
        return None
    svg, counts = drawn
    total = sum(counts.values())
    shares = {kind: _percent(count / total) for kind, count in counts.items()}
    caption = (
        f"{total:,} tokens; zero gradient: {shares['up']} above, {shares['down']} below. "
        f"Outside, but moving back: {shares['inward']}."
    )
    return _figure(run.name, svg, caption)


def _figure(title: str, svg: str | None, caption: str) -> str:
    body = svg or '<p class="muted">Not recorded.</p>'
    return f"<figure><h3>{escape(title)}</h3>{body}<figcaption>{escape(caption)}</figcaption></figure>"


def _key(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    items = ""
    for arm in by_arm(runs):
        name = arm[0].name if len(arm) == 1 else f"{clip_label(arm[0].info)} ({len(arm)} runs)"
        items += f"<li>{_chip(arm[0].arm)}{escape(name)}</li>"
    return f'<ul class="key">{items}</ul>'


def _chip(i: int) -> str:
    from bandpo.train.figures import colour_name

    name, dashed = colour_name(i)
    return f'<i style="border-color:var(--{name});border-top-style:{"dashed" if dashed else "solid"}"></i>'


# ---------------------------------------------------------------- tables


def _samples(runs: Sequence[Run]) -> str:
    firsts = [arm[0] for arm in by_arm(runs)]
    tables = [_sample_table(run, opened=run is runs[0]) for run in firsts if run.samples]
    return f"<h2>Completions before and after</h2>{''.join(tables)}" if tables else ""


def _sample_table(run: Run, *, opened: bool) -> str:
    def cell(text: object, correct: object) -> str:
        mark = {True: '<span class="right">✓</span> ', False: '<span class="wrong">✗</span> '}.get(correct, "")  # type: ignore[call-overload]
        return f'<td class="text">{mark}{escape(str(text))}</td>'

    rows = []
    for sample in run.samples:
        given = cell(_prompt(sample.get("prompt", "")), None) + cell(sample.get("answer", ""), None)
        before = cell(sample.get("before", ""), sample.get("correct_before"))
        rows.append(f"<tr>{given}{before}{cell(sample.get('after', ''), sample.get('correct_after'))}</tr>")
    table = _table("<th>prompt</th><th>answer</th><th>before</th><th>after</th>", rows)
    return f"<details{' open' if opened else ''}><summary>{escape(run.name)}</summary>{table}</details>"


def _repeat(runs: Sequence[Run]) -> str:
    """Give the command and, where they differ from the first run's, recipe, versions and machine of every run."""
    parts, shown = [], set[str]()
    for run in runs:
        command = f'<div class="copy"><pre>{escape(str(run.info.get("command")))}</pre><button>copy</button></div>'
        found = [command] if run.info.get("command") else []
        found += [_origin(run)]
        if run.recipe:
            opened = " open" if len(runs) == 1 else ""
            found.append(
                f"<details{opened}><summary>Recipe, resolved</summary><pre>{escape(run.recipe)}</pre></details>"
            )
        new = [part for part in found if part not in shown]
        shown.update(new)
        if new:
            parts += [f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "", *new]
    return f"<h2>Repeat it</h2>{''.join(parts)}"


def _origin(run: Run) -> str:
    rows = [("seed", run.info.get("seed")), ("commit", run.info.get("commit"))]
    rows += [*_pairs(run.info.get("versions")), *_pairs(run.info.get("machine"))]
    cells = [f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in rows if v is not None]
    return f"<details open><summary>Versions and machine</summary>{_table('', cells)}</details>" if cells else ""


# ---------------------------------------------------------------- small things


def _table(header: str, rows: Sequence[str]) -> str:
    head = f"<thead><tr>{header}</tr></thead>" if header else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _pairs(found: object) -> Iterable[tuple[str, Any]]:
    return found.items() if isinstance(found, dict) else []


def _task(run: Run) -> str:
    return str(run.info.get("task", run.folder.name))


def _prompt(prompt: object) -> str:
    """Return a prompt as text: a string, or chat messages."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)
    return str(prompt)


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(run: Run, key: str) -> float | None:
    values = [record[key] for record in run.steps if _finite(record.get(key))]
    return sum(values) / len(values) if values else None


def _highest(run: Run, key: str) -> float | None:
    return max((record[key] for record in run.steps if _finite(record.get(key))), default=None)


def _percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if _finite(value) else "–"


def _number(value: Any) -> str:
    return f"{value:.2f}" if _finite(value) else "–"


def _interval(evaluation: dict[str, Any]) -> str:
    low, high = evaluation.get("low"), evaluation.get("high")
    return f"{100 * low:.1f} to {100 * high:.1f}" if _finite(low) and _finite(high) else "not recorded"


def _duration(seconds: Any) -> str:
    if not _finite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
