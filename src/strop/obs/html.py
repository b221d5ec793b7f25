"""One page about a run, to hand around: a single file without links, scripts or fonts from elsewhere.

It holds how the run stands, why it failed last, who did what when (`timeline`), every attempt's end and
cost, the curves (`curves`) and the configuration without its secrets. Everything that a run wrote is
escaped; the page's own policy forbids the browser to load anything.
"""

from __future__ import annotations

import dataclasses
import html
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from strop.obs import curves, fates, run_files, status, timeline
from strop.obs import why as why_module
from strop.obs.log_text import printable
from strop.obs.progress import seconds
from strop.obs.secrets import mask, mask_args, redact
from strop.obs.why import Group, Why
from strop.obs.why_text import clock, date, first_line, trace_end, where
from strop.slurm import decide
from strop.slurm.hostlist import ranges

HERE = Path(__file__).parent
PHASES = ("start", "preflight", "data", "rendezvous", "model", "resume", "probe", "reference", "train",
          "validation", "metrics", "save")  # fmt: skip
"""In the order of a run's life; the style sheet has a colour for each."""
SHORTENED_WAIT = 0.06
"""Waiting between two attempts takes at most this share of all running time on the timeline's axis."""
TRACE_FRAMES = 8


def report(run_dir: Path, attempt: Optional[int] = None) -> str:
    """The page's text; of one attempt's ranks and end, if it is given. Raises UserError if that is no run, or
    has no such attempt."""
    run = why_module.read(run_dir)
    now = status.assess(run)
    why = why_module.explain_read(run, now, attempt)
    chosen = now if attempt is None else _only(now, attempt)
    found = _fates(run)
    charts = curves.curves(run_files.json_lines(run_dir / "metrics.jsonl"), run.timing)
    drawn = [curves.svg(curve, str(i)) for i, curve in enumerate(charts)]
    line = _timeline_data(run, chosen, found)
    data = {"timeline": line, "curves": {str(i): told for i, (_, told) in enumerate(drawn)}}
    sections = [
        _header(run, now, why),
        _tiles(now),
        _why(why, f"Attempt {attempt}" if attempt is not None else f"Last failure: attempt {why.attempt}"),
        _timeline(line),
        _attempts(chosen, found),
        _section("Metrics", f'<div class="charts">{"".join(figure for figure, _ in drawn)}</div>')
        if drawn
        else _section("Metrics", '<p class="none">nothing has been measured yet</p>'),
        _config(run),
    ]
    return _page(now.name, "\n".join(sections), data)


def _only(now: status.Status, attempt: int) -> status.Status:
    return dataclasses.replace(now, attempts=tuple(a for a in now.attempts if a.attempt == attempt))


def _page(name: str, body: str, data: Mapping[str, Any]) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    told = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_e(name)}</title>
<style>
{(HERE / "report.css").read_text()}</style>
</head>
<body>
<main>
{body}
<footer>Made by strop on {made} UTC. Times are UTC.</footer>
</main>
<div id="tip" class="tip" hidden></div>
<script id="data" type="application/json">{told}</script>
<script>
{(HERE / "report.js").read_text()}</script>
</body>
</html>
"""


def _e(value: object) -> str:
    return html.escape(printable(str(value)))


def _section(title: str, body: str) -> str:
    return f"<h2>{_e(title)}</h2>\n{body}"


def _fates(run: run_files.RunFiles) -> dict[int, fates.Fates]:
    following = [*run.records[1:], None]
    return {r["attempt"]: fates.read(run.directory, r, after) for r, after in zip(run.records, following)}


# --------------------------------------------------------------------------------------- head, tiles


def _header(run: run_files.RunFiles, now: status.Status, why: Why) -> str:
    kind = "bad" if now.state in status.BAD else "good" if now.state == "finished" else "warn"
    kind = "" if now.state in status.RUNNING else kind
    newest = now.attempts[-1] if now.attempts else None
    model = (run.config.get("model") or {}).get("path") if isinstance(run.config.get("model"), dict) else None
    parts = [now.algo or "", str(model or ""), f"job {now.job_id}" if now.job_id else ""]
    if newest:
        parts.append(f"{len(newest.nodes)} node{'s' if len(newest.nodes) != 1 else ''}")
        parts.append(f"first started {date(now.attempts[0].began)}")
    about = " · ".join(_e(redact(part)) for part in parts if part)
    detail = f'<span class="sub">{_e(redact(now.detail))}</span>' if now.detail else ""
    return (
        f'<header><h1>{_e(now.name)}</h1><span class="pill {kind}">{_e(now.state)}</span>'
        f'<span class="sub">{about}</span>{detail}</header>'
    )


def _tiles(now: status.Status) -> str:
    failed = sum(a.cause is not None and a.cause not in fates.WELL for a in now.attempts)
    share = 0.0 if not now.total_steps else min(1.0, now.step / now.total_steps)
    of = f" <small>of {now.total_steps}</small>" if now.total_steps else ""
    lost = sum(a.lost_s or 0 for a in now.attempts) + sum(a.resume_s or 0 for a in now.attempts)
    tiles = [_tile("Step", f"{now.step}{of}", f'<div class="bar"><i style="width:{share:.1%}"></i></div>')]
    if now.effective_ratio is not None:
        more = f"{seconds(now.kept_s)} of {seconds(now.wall_s - now.queue_s)}"
        tiles.append(_tile("Effective time", f"{now.effective_ratio:.1%}", more))
    cost = f"{failed} failed; interruptions cost {seconds(lost)}"
    tiles.append(_tile("Attempts", str(len(now.attempts)), cost))
    if now.metrics and isinstance(now.metrics.get("loss"), (int, float)):
        at = f"training, step {now.metrics['step']}"
        tiles.append(_tile("Loss", f"{now.metrics['loss']:.4f}", at))
    if now.tokens_per_s is not None:
        pace = f"{curves.number(now.tokens_per_s)} <small>tokens/s</small>"
        tiles.append(_tile("Throughput", pace, "median of the last steps"))
    tiles.append(_tile("Wall time", seconds(now.wall_s), f"{seconds(now.queue_s)} of it in the queue"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, value: str, more: str) -> str:
    """value, more: HTML."""
    return (
        f'<div class="tile"><div class="name">{_e(name)}</div><div class="value">{value}</div>'
        f'<div class="more">{more}</div></div>'
    )


# ----------------------------------------------------------------------------------------------- why


def _why(why: Why, title: str) -> str:
    if why.attempt is None:
        return _section("Last failure", f'<p class="none">No attempt has failed. Next: {_e(why.next)}</p>')
    words = decide.WORDS.get(why.cause or "", why.cause or "it runs")
    f = why.first
    body = f'<div class="head">{_e(words)}'
    body += f' <span class="where">— {_e(where(f))}</span></div>' if f else "</div>"
    if f and f.message.strip():
        named = f"{f.exception}: " if f.exception and not f.message.startswith(f.exception) else ""
        body += f'<div class="message mono">{_e(named + f.message.strip()[:2000])}</div>'
    if f and f.traceback:
        body += f'<div class="trace mono">{_e(chr(10).join(trace_end(f.traceback, TRACE_FRAMES)))}</div>'
    rows = [("same error", [_group(why.alike)])] if why.alike else []
    rows += [("log", [_log(why)])] if why.lines else []
    for label, groups in (("others", why.others), ("followed", why.followed), ("silent", why.silent)):
        rows += [(label, [_group(g) for g in groups])] if groups else []
    rows += [("Slurm", [f'<span class="mono">{_e(line)}</span>' for line in why.slurm])] if why.slurm else []
    rows += [("decision", [_e(why.decision)]), ("next", [_e(line) for line in why.next.splitlines()])]
    rows += [("note", [_e(note) for note in why.notes])] if why.notes else []
    listed = "".join(f"<dt>{label}</dt><dd>{'<br>'.join(lines)}</dd>" for label, lines in rows)
    plain = f"<details><summary>as text</summary><pre>{_e(why_module.text(why))}</pre></details>"
    title += f" of {why.num_attempts}"
    return _section(title, f'<div class="card why">{body}<dl>{listed}</dl>{plain}</div>')


def _group(group: Optional[Group]) -> str:
    assert group is not None
    count, nodes = len(group.ranks), ""
    if group.nodes:
        nodes = f" on {group.nodes[0] if len(group.nodes) == 1 else f'{len(group.nodes)} nodes'}"
    named = f"rank{'s' if count > 1 else ''} {ranges(group.ranks, 24)}{nodes}"
    return f'<span class="count">{count}</span>{_e(group.what)} <span class="none">{_e(named)}</span>'


def _log(why: Why) -> str:
    rows = [
        f'<tr><td class="at">{clock(line.time) if line.time is not None else ""}</td>'
        f'<td class="at">{_e(line.ranks)}</td><td class="{_e(line.level)}">{_e(line.level or "raw")}</td>'
        f"<td>{_e(line.message[:1000])}</td></tr>"
        for line in why.lines
    ]
    return f'<table class="logs mono">{"".join(rows)}</table>'


# ------------------------------------------------------------------------------------------ timeline


def _timeline_data(
    run: run_files.RunFiles, now: status.Status, found: Mapping[int, fates.Fates]
) -> dict[str, Any]:
    rows = [(a.attempt, a.began, a.ended) for a in now.attempts]
    bands = timeline.bands(run.directory, rows, found, run.now)
    attempts: list[dict[str, Any]] = [
        {
            "attempt": a.attempt,
            "began": a.began,
            "ended": run.now if a.ended is None else a.ended,
            "cause": decide.WORDS.get(a.cause or "", a.cause or ""),
            "ok": a.cause in ("done", None),
            "bad": a.cause is not None and a.cause not in fates.WELL,
        }
        for a in now.attempts
    ]
    return {
        "phases": PHASES,
        "attempts": attempts,
        "pieces": _pieces([(a["began"], a["ended"]) for a in attempts]),
        "bands": [
            {
                "ranks": ranges(band.ranks, 24),
                "count": len(band.ranks),
                "nodes": _few(band.nodes),
                "culprit": band.is_culprit,
                "lives": [
                    {
                        "attempt": life.attempt,
                        "end": life.end,
                        "spans": [[s.phase, s.begin, s.end, s.first_step, s.last_step] for s in life.spans],
                    }
                    for life in band.lives
                ],
            }
            for band in bands
        ],
    }


def _few(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _pieces(times: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float, bool]]:
    """(from, to, x from, x to, whether nothing ran): attempts to scale, waiting shortened."""
    running = sum(max(0.0, ended - began) for began, ended in times) or 1.0
    pieces: list[tuple[float, float, float, float, bool]] = []
    x = 0.0
    for began, ended in times:
        before = pieces[-1][1] if pieces else began
        if began > before:
            wait = min(began - before, SHORTENED_WAIT * running)
            pieces.append((before, began, x, x + wait, True))
            x += wait
        began, ended = max(began, before), max(ended, before, began)
        pieces.append((began, ended, x, x + ended - began, False))
        x += ended - began
    return pieces


def _timeline(line: Mapping[str, Any]) -> str:
    if not line["bands"]:
        return _section("Ranks over time", '<p class="none">the ranks left no logs</p>')
    used = {span[0] for band in line["bands"] for life in band["lives"] for span in life["spans"]}
    legend = "".join(f'<span><i style="background:var(--{p})"></i>{p}</span>' for p in PHASES if p in used)
    legend += '<span><b style="color:var(--bad)">✕</b> failed first</span>' * any(
        b["culprit"] for b in line["bands"]
    )
    shown = line["attempts"][-8:] if len(line["attempts"]) > 1 else []
    buttons = "".join(f'<button data-attempt="{a["attempt"]}">attempt {a["attempt"]}</button>' for a in shown)
    rows = "".join(
        f"<tr><td>{_e(b['ranks'])}</td><td class=num>{b['count']}</td><td class=wide>{_e(b['nodes'])}</td>"
        f"<td class=wide>{_e('; '.join(_life_words(life) for life in b['lives']))}</td></tr>"
        for b in line["bands"]
    )
    table = (
        "<details><summary>as a table</summary><table class=grid><tr><th>ranks<th class=num>count<th>nodes"
        f"<th>phases, and the end of each attempt</tr>{rows}</table></details>"
    )
    return _section(
        "Ranks over time",
        f'<div class="card"><div class="legend">{legend}<span class="buttons">{buttons}'
        f'<button data-attempt="">all</button></span></div><div id="timeline"></div>'
        f'<div class="legend" style="margin:6px 0 0">Ranks that lived alike are one band. '
        f"Ctrl + wheel: zoom, drag: move, double click: all.</div><div class=scroll>{table}</div></div>",
    )


def _life_words(life: Mapping[str, Any]) -> str:
    phases = list(dict.fromkeys(span[0] for span in life["spans"]))
    return f"{life['attempt']}: {' '.join(phases)}, {life['end'] or 'runs'}"


# ------------------------------------------------------------------------------ attempts, configuration


def _attempts(now: status.Status, found: Mapping[int, fates.Fates]) -> str:
    heads = ("#", "job", "nodes", "began", "took", "cause", "first", "action", "steps", "committed",
             "repeated", "lost", "resume")  # fmt: skip
    right = ("took", "steps", "committed", "repeated", "lost", "resume")
    rows = []
    for a in now.attempts:
        first = found[a.attempt].first
        kind = "well" if a.cause in ("done", None) else "stopped" if a.cause in fates.WELL else "failed"
        cells = [
            str(a.attempt),
            a.job_id or "",
            a.nodes[0] + (f" +{len(a.nodes) - 1}" if len(a.nodes) > 1 else "") if a.nodes else "",
            date(a.began),
            "" if a.ended is None else seconds(a.ended - a.began),
            decide.WORDS.get(a.cause, a.cause) if a.cause else now.state,
            "" if first is None else f"rank {first.rank}" + (f", {first.node}" if first.node else ""),
            a.action or "",
            str(a.steps),
            "–" if a.committed_step is None else str(a.committed_step),
            str(a.repeated_steps),
            "" if a.lost_s is None else seconds(a.lost_s),
            "" if a.resume_s is None else seconds(a.resume_s),
        ]
        rows.append(
            "<tr>"
            + "".join(
                f'<td class="{"num" if head in right else kind if head == "cause" else ""}" '
                f'title="{_e(redact(first_line(a.summary))) if head == "cause" else ""}">{_e(cell)}</td>'
                for head, cell in zip(heads, cells)
            )
            + "</tr>"
        )
    header = "".join(f'<th class="{"num" if h in right else ""}">{h}</th>' for h in heads)
    table = f'<table class="grid"><tr>{header}</tr>{"".join(rows)}</table>'
    table = table if rows else '<p class="none">none has begun</p>'
    return _section("Attempts", f'<div class="card scroll">{table}</div>')


def _config(run: run_files.RunFiles) -> str:
    tree = mask(run.config)
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    sections = [("general", plain)] if plain else []
    sections += [(key, value) for key, value in tree.items() if isinstance(value, dict)]
    body = "".join(
        f"<section><h3>{_e(name)}</h3><table class=mono>"
        + "".join(f"<tr><td>{_e(key)}</td><td>{_e(_value(value))}</td></tr>" for key, value in values.items())
        + "</table></section>"
        for name, values in sections
        if values
    )
    args = mask_args(map(str, run.records[-1].get("args") or [])) if run.records else []
    command = f"<p class=mono>{_e(' '.join(args))}</p>" if args else ""
    if not body:
        body = '<p class="none">config.yaml is not there, or cannot be read</p>'
    return _section("Configuration", f'<div class="card">{command}<div class="config">{body}</div></div>')


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)
