"""A pipeline without Slurm: its parts one after the other on this machine, by the same job body.

Each part is a process of its own session, whose output goes to the pipeline's directory. Ctrl-C (or TERM)
asks the part under way to stop: a run commits and ends, and the next call goes on there.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, Optional

from strop.pipeline import parts as parts_module
from strop.pipeline import standing
from strop.pipeline.graph import Graph, Node
from strop.pipeline.parts import Part
from strop.slurm import code, env, lease

POLL_S = 0.2
Say = Callable[[str], None]


class Interrupted(Exception):
    """Somebody wants the prompt back; what was under way has committed and ended."""


def run(graph: Graph, parts: Sequence[Part], say: Say) -> int:
    """Run what is not done. The exit code of the first part that fails, 0 when all are done."""
    graph.driver = _process(os.getpid())
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        for part in parts:
            if standing.look(graph)[part.name].state == "done":
                say(f"{part.name}: done already")
                continue
            exit_code = _run_part(graph, part, say)
            if exit_code != 0:
                return exit_code
            s = standing.look(graph)[part.name]
            if s.state != "done":
                say(f"{part.name}: {standing.told(s)}")
                return s.exit_code or 1
    finally:
        graph.driver = None
        graph.write()
    return 0


def _as_ctrl_c(number: int, frame: Optional[FrameType]) -> NoReturn:
    raise KeyboardInterrupt


def _process(pid: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": pid, "start": lease.process_start(pid)}


def _run_part(graph: Graph, part: Part, say: Say) -> int:
    node = graph.nodes[part.name]
    begin = time.monotonic()
    process = _start(graph, node, part)
    say(f"{part.name}: started ({node.outputs[-1]})")
    interrupted = False
    while process.poll() is None:
        try:
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            if not interrupted:
                say(f"{part.name}: asked to stop; a run commits first (once more: end it at once)")
                process.terminate()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            interrupted = True
    node.exit_code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    node.process = None
    graph.write()
    if interrupted and node.exit_code != 0:
        raise Interrupted
    seconds = time.monotonic() - begin
    say(f"{part.name}: {f'exit code {node.exit_code}' if node.exit_code else 'done'} after {seconds:.0f} s")
    if interrupted:
        raise Interrupted
    return node.exit_code


def _start(graph: Graph, node: Node, part: Part) -> subprocess.Popen[bytes]:
    """The record comes right behind the start, and with it the process is found if this one is killed."""
    variables = env.all_variables()
    python = variables.get("PYTHON") or sys.executable
    root = code.REPOSITORY
    variables |= {
        "STROP_LAUNCHER": "local",
        "STROP_LOCAL_RANKS": str(parts_module.local_ranks(part.slurm) if part.kind == "run" else 1),
        "PYTHON": python,
        "PYTHONPATH": os.pathsep.join(filter(None, [f"{root}/src", str(root), variables.get("PYTHONPATH")])),
    }
    output = graph.directory / f"{parts_module.job_name(graph.name, part.name)}.out"
    with open(output, "ab") as file:
        process = subprocess.Popen(
            parts_module.local_command(part, python),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    node.jobs.append(f"local-{process.pid}")
    node.outputs.append(str(output))
    node.process, node.exit_code, node.again = _process(process.pid), None, False
    node.submitted = None
    graph.write()
    return process


def cancel(graph: Graph) -> Optional[int]:
    """Ask the process that runs the pipeline to end, else the part that it has left. Its number."""
    left = [node.process for node in graph.nodes.values() if node.process is not None]
    for p in [graph.driver, *left]:
        here = p is not None and p["host"] == socket.gethostname()
        if here and p is not None and lease.process_start(p["pid"]) == p["start"] is not None:
            os.kill(p["pid"], signal.SIGTERM)
            return int(p["pid"])
    return None
