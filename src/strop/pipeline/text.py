"""A pipeline for people: a small tree, each stage under the last run (else preparation) before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from strop.obs.progress import seconds
from strop.obs.status_text import style
from strop.pipeline.graph import Graph
from strop.pipeline.standing import ACTIVE, WORKING, Standing, overall, told

BAR_WIDTH = 10


def tree(graph: Graph, standings: Mapping[str, Standing]) -> RenderableType:
    state = overall(standings)
    head = Text.assemble(("pipeline ", ""), (graph.name, "bold"), "  ", (state, style(state)))
    lines: list[RenderableType] = [head]
    stages = list(dict.fromkeys(node.stage for node in graph.nodes.values()))
    above = {stage: _above(graph, stage) for stage in stages}
    width = max(len(stage) + 3 * _depth(stage, above) for stage in stages)

    def draw(stage: str, indent: str, last: bool, root: bool) -> None:
        mark = "" if root else "└─ " if last else "├─ "
        lines.append(_line(stage, graph, standings, f"{indent}{mark}", width))
        lines.extend(_reasons(stage, graph, standings, indent + ("" if root else "   " if last else "│  ")))
        below = [other for other in stages if above[other] == stage]
        inner = indent + ("" if root else "   " if last else "│  ")
        for other in below:
            draw(other, inner, other == below[-1], False)

    for stage in stages:
        if above[stage] is None:
            draw(stage, "", True, True)
    return Group(*lines)


def _above(graph: Graph, stage: str) -> str | None:
    first = next(node for node in graph.nodes.values() if node.stage == stage)
    exports = [name for name in first.after if graph.nodes[name].kind == "export"]
    return graph.nodes[(exports or first.after)[-1]].stage if first.after else None


def _depth(stage: str, above: Mapping[str, str | None]) -> int:
    upper = above[stage]
    return 0 if upper is None else 1 + _depth(upper, above)


def shown(stage: str, graph: Graph, standings: Mapping[str, Standing]) -> Standing:
    """The part that tells how a stage stands: its run until that is done, then its export."""
    of = [standings[node.name] for node in graph.nodes.values() if node.stage == stage]
    return next((s for s in of if s.state != "done"), of[-1])


def _line(
    stage: str, graph: Graph, standings: Mapping[str, Standing], lead: str, width: int
) -> RenderableType:
    s = shown(stage, graph, standings)
    of = {n.kind: standings[n.name] for n in graph.nodes.values() if n.stage == stage}
    text = Text(f"{lead}{stage}".ljust(width + 2))
    text.append(f"{s.state} ".ljust(13), style=style("finished" if s.state == "done" else s.state))
    run = of.get("run")
    parts = []
    if run is not None and run.step is not None and (run.state in ACTIVE or run.step):
        parts.append(_progress(run))
    if run is not None and run.state in WORKING and run.eta_s is not None:
        parts.append(f"eta {seconds(run.eta_s)}")
    if s.job_id is not None and s.state != "done":
        parts.append(s.job_id if s.job_id.startswith("local") else f"job {s.job_id}")
    if s.state == "done" and s.kind == "export":
        parts.append(f"-> {_short(s.result)}")
    text.append("  ".join(parts))
    return Text(text.plain.rstrip(), spans=text.spans)


def _reasons(
    stage: str, graph: Graph, standings: Mapping[str, Standing], indent: str
) -> list[RenderableType]:
    s = shown(stage, graph, standings)
    lines = []
    if s.state in (*ACTIVE, "not submitted"):
        lines += [s.detail] if s.detail else []
    elif s.cause is not None:
        lines += [s.detail.splitlines()[0][:160]]
    elif s.bad or s.state == "unknown":
        lines += [told(s)]
    lines += [f"next: {s.next_action}"] if s.next_action else []
    return [Text(f"{indent}      {line}") for line in lines]


def _progress(s: Standing) -> str:
    assert s.step is not None
    if not s.total_steps:
        return f"step {s.step}"
    done = round(BAR_WIDTH * s.step / s.total_steps)
    return f"[{'#' * done}{'.' * (BAR_WIDTH - done)}] {s.step}/{s.total_steps}"


def _short(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
