"""How the parts of a pipeline stand: read from its runs, its results and Slurm, then judged purely.

A part is done when its result is there, whoever made it: a preparation's record, a run that has finished, an
export of the checkpoint that is wanted. Where there is no result, a run's own records say how it stands
(`strop.obs.status`), else Slurm says it of the newest job, and where Slurm has forgotten that, what came
before it explains it.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.errors import EXIT_TERM, EXIT_YIELD
from strop.obs import run_files, status
from strop.obs.status import RUNNING, Status
from strop.pipeline import exports
from strop.pipeline.graph import Graph, Node
from strop.slurm import attempts, command, lease

WORKING = (*RUNNING, "preparing", "exporting")
WAITING = ("queued", "waiting", "held")
"""With a job in the queue."""
ACTIVE = (*WORKING, *WAITING)
TAIL_BYTES = 20_000
DEADLINE_S = 4.0
ON_REQUEST = "on request"
"""How the detail of a part begins that its owner has stopped."""


@dataclass(frozen=True)
class Facts:
    """What was read about one part."""

    done: bool
    status: Optional[Status] = None
    """Of a run whose first attempt has begun."""
    job: Optional[Mapping[str, str]] = None
    """Slurm's record of the newest job; {} if it has forgotten it; None if there is none, or no answer."""
    alive: bool = False
    """Its local process runs."""
    exit_code: Optional[int] = None
    words: str = ""
    """What it said last, in one line."""
    refused: bool = False
    """Of a run: the newest job could not begin an attempt (the code was changed, say), so the records tell of
    others."""


@dataclass(frozen=True)
class Standing:
    name: str
    stage: str
    kind: str
    state: str
    """done; those of a run (tools.status); preparing, exporting; waiting (for what comes before it);
    not submitted; unknown (Slurm does not answer)."""
    detail: str
    job_id: Optional[str]
    exit_code: Optional[int]
    result: str
    step: Optional[int] = None
    total_steps: Optional[int] = None
    eta_s: Optional[float] = None
    tokens_per_s: Optional[float] = None
    cause: Optional[str] = None
    """The part whose end cancelled this one."""
    next_action: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def bad(self) -> bool:
        """It has ended, or was never begun, and nothing goes on by itself."""
        return self.state not in ("done", "not submitted", "unknown", *ACTIVE)


def look(graph: Graph) -> dict[str, Standing]:
    return judge(graph, gather(graph))


def gather(graph: Graph) -> dict[str, Facts]:
    found = {}
    answers = shutil.which("scontrol") is not None
    for node in graph.nodes.values():
        facts = _facts(node, None)
        if answers and _is_open(node, facts):
            try:
                job = command.show_job(node.jobs[-1], deadline_s=DEADLINE_S) or {}
                facts = _facts(node, job)
            except command.SlurmError:
                answers = False
        found[node.name] = facts
    return found


def _is_open(node: Node, facts: Facts) -> bool:
    """Whether its newest job may still tell something: not that of a part that it has brought to its end."""
    if not node.jobs or node.jobs[-1].startswith("local-"):
        return False
    s = facts.status
    ended_by_it = s is None or s.attempts[-1].job_id == node.jobs[-1]
    return not (facts.done and ended_by_it)


def _facts(node: Node, job: Optional[Mapping[str, str]]) -> Facts:
    result = Path(node.result)
    if node.kind == "run":
        if not run_files.is_run(result):
            return Facts(False, None, job, is_alive(node), node.exit_code, _last_words(node))
        standing = status.assess(run_files.read(result, quick=True, slurm_deadline_s=DEADLINE_S))
        newest = (attempts.read_all(result) or [{}])[-1]
        done = standing.state == "finished" and not node.again
        refused = _was_refused(node, newest, job)
        code = _exit_code(job) if refused else newest.get("exit_code")
        code = node.exit_code if code is None else code
        return Facts(done, standing, job, is_alive(node), code, "" if done else _last_words(node), refused)
    if node.kind == "prepare":
        done = stores_are_there(result)
    else:
        assert node.run is not None
        done = exports.is_done(result, Path(node.run), node.step, node.dtype)
    return Facts(
        done and not node.again, None, job, is_alive(node), node.exit_code, "" if done else _last_words(node)
    )


def stores_are_there(record: Path) -> bool:
    value = files.read_json(record)
    if not isinstance(value, dict):
        return False
    config = Path(value.get("config", ""))
    unchanged = config.is_file() and files.sha256(config) == value.get("config_sha256")
    return unchanged and all(Path(path).exists() for path in value.get("stores", [""]))


def is_alive(node: Node) -> bool:
    p = node.process
    return p is not None and lease.process_start(p["pid"]) == p["start"] is not None


def _last_words(node: Node) -> str:
    """The last line of the newest job's output that tells of an error."""
    path = Path(node.outputs[-1]) if node.outputs else None
    if path is None or not path.is_file():
        return ""
    lines = files.tail(path, TAIL_BYTES).decode(errors="replace").splitlines()
    told = [line for line in lines if re.match(r"(error|strop|slurmstepd|slurmd|\w*Error)\b.*:", line)]
    return (told or lines or [""])[-1][:300]


# ------------------------------------------------------------------------------------------- judgement


def judge(graph: Graph, facts: Mapping[str, Facts]) -> dict[str, Standing]:
    """In the graph's order: what comes before a part is judged before it."""
    found: dict[str, Standing] = {}
    for node in graph.nodes.values():
        f = facts[node.name]
        state, detail = _state(node, f)
        cause = None
        broken = next((found[up.name] for up in graph.above(node) if found[up.name].bad), None)
        if broken is not None and node.jobs and state in ("cancelled", "failed") and _never_began(f):
            root = found[broken.cause] if broken.cause else broken
            state, cause = "cancelled", root.name
            detail = f"{root.name} {told(root)}"
        s = f.status
        code = f.exit_code if f.exit_code is not None else _exit_code(f.job)
        found[node.name] = Standing(
            name=node.name,
            stage=node.stage,
            kind=node.kind,
            state=state,
            detail=detail,
            job_id=(s.job_id if s and s.state in ACTIVE else None) or (node.jobs[-1] if node.jobs else None),
            exit_code=None if state in ("done", "not submitted") or cause else code,
            result=node.result,
            step=s.step if s else None,
            total_steps=s.total_steps if s else None,
            eta_s=s.eta_s if s else None,
            tokens_per_s=s.tokens_per_s if s else None,
            cause=cause,
            next_action=_next(node, state, cause, graph),
        )
    return found


def _state(node: Node, f: Facts) -> tuple[str, str]:
    working = {"prepare": "preparing", "export": "exporting", "run": "starting"}[node.kind]
    s, job = f.status, f.job or {}
    living = bool(job) and job["JobState"] not in command.ENDED
    if f.done and not (living and s is not None and s.attempts[-1].job_id != job["JobId"]):  # extended
        return "done", ""
    if s is not None and s.state in ACTIVE:
        return s.state, s.detail
    if f.alive:
        return working, ""
    if living:
        return _of_living_job(job, working)
    if node.again or not node.jobs:
        return "not submitted", "its configuration has changed" if node.again else ""
    if s is not None:
        return ("failed", f.words) if f.refused else (s.state, _message(s))
    if node.jobs[-1].startswith("local-"):
        if f.exit_code in (EXIT_TERM, EXIT_YIELD):
            return "stopped", f"{ON_REQUEST}; what is finished is kept"
        if f.exit_code == 0:
            return "failed", f"it ended with exit code 0, but {node.result} is not there"
        return ("failed", f.words) if f.exit_code is not None else ("dead", "its process is gone")
    if f.job is None:
        return "unknown", f"job {node.jobs[-1]}: Slurm does not answer"
    if not job:
        told = f"{node.result} is not there, and Slurm has forgotten job {node.jobs[-1]}"
        return "failed", f"{told}; it said: {f.words}" if f.words else told
    if job["JobState"] == "CANCELLED":
        return "cancelled", f"{ON_REQUEST}, before it began" if _never_began(f) else f.words
    if job["JobState"] == "COMPLETED":
        return "failed", f"it ended with exit code 0, but {node.result} is not there"
    if _exit_code(job) == EXIT_YIELD:
        return "stopped", f.words
    return "failed", f.words or job["JobState"]


def _of_living_job(job: Mapping[str, str], working: str) -> tuple[str, str]:
    reason = job.get("Reason", "None")
    if job["JobState"] != "PENDING":
        return working, ""
    if reason in ("Dependency", "DependencyNeverSatisfied"):
        return "waiting", ""
    return ("held" if "held" in reason.lower() else "queued"), "" if reason == "None" else reason


def _never_began(f: Facts) -> bool:
    """Its newest job was taken out of the queue before it started, or there is none."""
    if f.status is not None:
        return f.status.state in ("failed", "cancelled") and bool(f.job) and _unstarted(f.job)
    return not f.words and (not f.job or _unstarted(f.job))


def _was_refused(node: Node, newest: Mapping[str, Any], job: Optional[Mapping[str, str]]) -> bool:
    if node.jobs and node.jobs[-1].startswith("local-"):
        return bool(node.exit_code) and node.jobs[-1] != f"local-{newest.get('pid')}"
    if not job or job.get("JobState") != "FAILED":
        return False
    before = newest.get("target") or newest.get("job_id") or ""
    return before.isdigit() and int(job["JobId"]) > int(before)


def _unstarted(job: Optional[Mapping[str, str]]) -> bool:
    return (
        bool(job)
        and job is not None
        and job.get("JobState") == "CANCELLED"
        and "NodeList" in job
        and (job["NodeList"] in ("", "(null)"))
    )


def _exit_code(job: Optional[Mapping[str, str]]) -> Optional[int]:
    code, _, number = (job or {}).get("ExitCode", "").partition(":")
    if not code.isdigit() or (job or {}).get("JobState") not in command.ENDED:
        return None
    return 128 + int(number) if number.isdigit() and int(number) else int(code)


def _message(s: Status) -> str:
    last = s.attempts[-1].summary if s.attempts else ""
    lines = last.splitlines()
    if s.attempts and s.attempts[-1].cause == "cancelled":
        done = s.checkpoints.committed
        return f"{ON_REQUEST}, " + (f"committed up to step {done[-1]}" if done else "nothing committed yet")
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else s.detail


def told(s: Standing) -> str:
    """ "failed (exit 78): optim.lr is ..."; the code of what somebody has stopped tells nothing more."""
    asked = s.detail.startswith(ON_REQUEST)
    code = f" (exit {s.exit_code})" if s.exit_code is not None and not asked else ""
    return f"{s.state}{code}" + (f": {s.detail}" if s.detail else "")


def _next(node: Node, state: str, cause: Optional[str], graph: Graph) -> str:
    if cause is not None or state in ("done", "not submitted", "unknown", *WORKING, "queued", "waiting"):
        return ""
    if state == "held":
        return f"see to the cause, then: scontrol release {node.jobs[-1] if node.jobs else ''}".rstrip()
    again = f"python -m tools.pipeline {shlex.quote(graph.source)}"
    again += " --executor local" if graph.executor == "local" else ""
    if state == "stopped" or (node.kind == "run" and state == "cancelled"):
        return f"to go on: {again}"
    if node.kind == "run" and state in ("failed", "dead", "stopped", "pending"):
        run = Path(node.result)
        shown = run.relative_to(graph.cwd) if run.is_relative_to(graph.cwd) else run
        return f"python -m tools.logs {shlex.quote(str(shown))} --why; then {again}"
    output = f"see {node.outputs[-1]}; then " if node.outputs and Path(node.outputs[-1]).exists() else ""
    return f"{output}{again}"


def overall(standings: Mapping[str, Standing]) -> str:
    """done; where something will not go on by itself failed, or cancelled or stopped, where somebody wanted
    it so; running, waiting, unknown."""
    states = list(standings.values())
    if all(s.state == "done" for s in states):
        return "done"
    ended = {s.state for s in states if s.bad and s.cause is None}
    if ended:
        return "failed" if ended - {"cancelled", "stopped"} else min(ended)
    if any(s.state in WORKING for s in states):
        return "running"
    return next((s.state for s in states if s.state != "done"), "done")


def first_bad(standings: Mapping[str, Standing]) -> Optional[Standing]:
    """The first failure that no other one has caused."""
    return next((s for s in standings.values() if s.bad and s.cause is None), None)


def as_dict(graph: Graph, standings: Mapping[str, Standing]) -> dict[str, Any]:
    return {
        "name": graph.name,
        "directory": str(graph.directory),
        "state": overall(standings),
        "parts": [dict(vars(s)) for s in standings.values()],
    }
