"""A run's status for people: one line of a list, or a page. On a terminal in colour, else the same words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Optional

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from strop.obs.progress import seconds, summary
from strop.obs.status import BAD, RUNNING, Status
from strop.slurm import decide

BAR_WIDTH = 24


def listing(statuses: Sequence[Status]) -> RenderableType:
    """One line a run."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for name in ("run", "state", "progress", "eta", "tok/s", "loss", "attempts", "job"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("eta", "tok/s", "loss") else "left")
    for s in statuses:
        table.add_row(
            Text(s.name),
            Text(s.state, style=style(s.state)),
            Text(_progress(s, 10)),
            seconds(s.eta_s) if s.eta_s is not None and s.state in RUNNING else "",
            f"{s.tokens_per_s:,.0f}" if s.tokens_per_s is not None else "",
            f"{s.metrics['loss']:.4f}" if s.metrics and s.metrics.get("loss") is not None else "",
            str(len(s.attempts)),
            s.job_id or "",
        )
    return table


def page(s: Status) -> RenderableType:
    """Everything about one run."""
    head = Text.assemble((s.name, "bold"), "  ", (s.state, style(s.state)))
    if s.detail:
        head.append(f": {s.detail}")
    parts: list[RenderableType] = [head, Text(_progress_line(s))]
    if s.metrics:
        parts.append(Text("  ".join([f"training:    step {s.metrics['step']}", *summary(s.metrics)])))
    if s.evaluation:
        plain = {key[5:]: value for key, value in s.evaluation.items() if key.startswith("eval_")}
        parts.append(Text("  ".join([f"validation:  step {s.evaluation['step']}", *summary(plain)])))
    parts += [Text(_checkpoints(s)), Text(""), _attempts(s), Text("")]
    parts.append(Text(_ratio(s)))
    last = s.attempts[-1].summary if s.attempts else ""
    if last and s.state not in ("finished", *RUNNING):
        parts.append(Text("last words:  " + "\n             ".join(last.splitlines())))
    parts.append(Text(f"next:        {s.next_action}"))
    return Group(*parts)


def style(state: str) -> str:
    if state in BAD:
        return "bold red"
    return {"finished": "green", "queued": "yellow", "cancelled": "yellow", "stopped": "yellow"}.get(
        state, "bold cyan"
    )


def _progress(s: Status, width: int) -> str:
    if s.total_steps is None:
        return f"step {s.step}"
    done = round(width * s.step / s.total_steps)
    return f"[{'#' * done}{'.' * (width - done)}] {s.step}/{s.total_steps}"


def _progress_line(s: Status) -> str:
    parts = [_progress(s, BAR_WIDTH)]
    if s.tokens_per_s is not None:
        parts.append(f"{s.tokens_per_s:,.0f} tok/s")
    if s.eta_s is not None and s.state != "finished":
        parts.append(f"eta {seconds(s.eta_s)}" + ("" if s.state in RUNNING else " of training"))
    return "  ".join(parts)


def _checkpoints(s: Status) -> str:
    c = s.checkpoints
    if not c.committed:
        text = "none committed"
    else:
        size = f" ({c.size_bytes / 2**30:.2f} GiB each)" if c.size_bytes else ""
        text = f"committed {', '.join(map(str, c.committed))}{size}"
    if c.best:
        text += f"; best {c.best['step']} ({c.best.get('metric')} {_number(c.best.get('value'))})"
    if c.damaged:
        text += f"; DAMAGED, set aside: {', '.join(c.damaged)}"
    if c.unfinished:
        text += f"; unfinished: {', '.join(c.unfinished)}"
    return f"checkpoints: {text}"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempts(s: Status) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    right = ("took", "steps", "repeated", "lost", "resume")
    for name in ("#", "nodes", "began", "took", "cause", "action", "steps", "committed", "repeated"):
        table.add_column(name, no_wrap=True, justify="right" if name in right else "left")
    table.add_column("lost", no_wrap=True, justify="right")
    table.add_column("resume", no_wrap=True, justify="right")
    for a in s.attempts:
        table.add_row(
            str(a.attempt),
            Text(_nodes(a.nodes)),
            time.strftime("%m-%d %H:%M:%S", time.localtime(a.began)),
            "" if a.ended is None else seconds(a.ended - a.began),
            decide.WORDS.get(a.cause, a.cause) if a.cause else s.state,
            a.action or "",
            str(a.steps),
            "-" if a.committed_step is None else str(a.committed_step),
            str(a.repeated_steps),
            _seconds(a.lost_s),
            _seconds(a.resume_s),
        )
    return table


def _nodes(nodes: Sequence[str]) -> str:
    return ",".join(nodes) if len(nodes) <= 3 else f"{nodes[0]} and {len(nodes) - 1} more"


def _seconds(value: Optional[float]) -> str:
    return "" if value is None else seconds(value)


def _ratio(s: Status) -> str:
    if s.effective_ratio is None:
        return "effective:   nothing has run yet"
    lost = sum(a.lost_s or 0 for a in s.attempts) + sum(a.resume_s or 0 for a in s.attempts)
    return (
        f"effective:   {s.effective_ratio:.1%} ({seconds(s.kept_s)} in steps that count, of "
        f"{seconds(s.wall_s - s.queue_s)} since the first start; interruptions cost {seconds(lost)}); "
        f"{seconds(s.queue_s)} in the queue beside it"
    )
