"""Hangs, crashes and bad nodes of real ranks, through the whole job body on this machine.

Faults come from outside (SIGSTOP) or out of a sitecustomize.py that the ranks find on their PYTHONPATH and
that changes what torch or strop does in one rank. The truth is what was done to which rank.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from strop.slurm import attempts
from tests import toy as toy_module
from tests.processes import pid_of_rank, steps

ROOT = Path(__file__).resolve().parents[2]
IMPATIENT = {"watchdog": {"step_s": 5.0, "step_factor": 1.0, "save_s": 5.0}}
"""Seconds without progress in training or saving; start-up keeps its long limit: this machine may be busy."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_module.make(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def start(toy, tmp_path, monkeypatch):
    """start(ranks, python code for sitecustomize.py, **configuration) -> the running job body."""
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[str]] = []

    def run(num_ranks: int, injected: str = "", **sections: Any) -> subprocess.Popen[str]:
        body = textwrap.indent(textwrap.dedent(injected) or "pass", "    ")
        code = f"import os\nif 'STROP_RANK' in os.environ:\n{body}"
        Path("site").mkdir()
        Path("site/sitecustomize.py").write_text(code)
        config = toy_module.config(toy, "dpo", Path("c.yaml"), **sections)
        variables = {**os.environ, "STROP_LAUNCHER": "local", "STROP_LOCAL_RANKS": str(num_ranks)}
        variables |= {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(
            ["bash", str(ROOT / "sbatch/lib.sh"), "dpo", "--config", str(config), "run.name=r"],
            env={**variables, "PYTHON": os.sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(job)
        return job

    yield run
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


RUN = Path("runs/r")
LOGS = RUN / "logs/0001"


def wait_for_step(job: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 240
    while not steps(RUN) or steps(RUN)[-1]["step"] < step:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def err(rank: int) -> str:
    return (LOGS / f"rank{rank:05d}.err").read_text()


def test_a_stopped_rank_is_named_and_the_run_goes_on(start):
    """Rank 1 of 3 is stopped: it can say nothing, the two others say where they wait for it."""
    job = start(3, **IMPATIENT, train={"max_steps": 60}, checkpoint={"every": 5})
    wait_for_step(job, 7)
    os.kill(pid_of_rank(RUN, 1), signal.SIGSTOP)
    stopped = time.monotonic()
    while not (LOGS / "hang.json").exists():
        assert time.monotonic() < stopped + 30
        time.sleep(0.1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    first, second = attempts.read_all(RUN)
    assert (first["cause"], first["action"], first["exit_code"]) == ("hang", "requeue", 70)
    assert second["cause"] == "done"
    assert "hung (rank 1" in output
    assert "rank 1 on" in first["summary"]
    assert "left no stacks: stopped, or its node is lost" in first["summary"]
    verdicts = attempts.read_verdicts(RUN, 1)
    assert [(v["rank"], v["kind"], v["exit_code"]) for v in verdicts] == [(0, "hang", 70), (2, "hang", 70)]
    for rank in (0, 2):
        assert "/strop/loop.py" in err(rank)  # Python stack of the main thread
        # and the threads that have none, gloo's among them (the second is all that torch 2.11 names)
        assert re.search(r" (gloo_tcp_loop|pt_gloo_runloop): [RS] ", err(rank))
    assert [s["step"] for s in steps(RUN)] == list(range(1, 61))


def test_the_only_rank_outside_of_a_collective_is_named(start):
    """Rank 2 sleeps where the others take their step and wait for it; its own watchdog dumps too."""
    job = start(
        3,
        """
        if os.environ["STROP_RANK"] == "2" and os.environ["STROP_ATTEMPT"] == "1":
            import time
            from torch.optim import adamw as module
            real = module.adamw
            def adamw(params, grads, first, second, largest, steps, **kwargs):
                if any(step == 2 for step in steps):
                    time.sleep(3600)
                return real(params, grads, first, second, largest, steps, **kwargs)
            module.adamw = adamw
        """,
        **IMPATIENT,
    )
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    first = attempts.read(RUN, 1)
    assert first["cause"] == "hang"
    assert {v["rank"] for v in attempts.read_verdicts(RUN, 1)} == {0, 1, 2}
    assert "hung (rank 2" in first["summary"]
    assert "sitecustomize.py" in first["summary"].splitlines()[0]  # where it stands


def test_native_crash_twice_at_the_same_place_ends_the_run(start):
    job = start(
        2,
        """
        if os.environ["STROP_RANK"] == "1":
            import ctypes
            from torch.optim import adamw as module
            def break_it():
                ctypes.string_at(0)
            def adamw(*args, **kwargs):
                break_it()
            module.adamw = adamw
        """,
    )
    output, _ = job.communicate(timeout=300)
    records = attempts.read_all(RUN)
    assert [(r["cause"], r["action"]) for r in records] == [("segfault", "requeue"), ("segfault", "stop")]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert job.returncode == 1
    assert "crashed in native code (rank 1" in output
    # of the thread that crashed, and of no other
    assert re.search(r"at __init__.py:\d+ in string_at < sitecustomize.py:\d+ in break_it", output)
    assert "native: " in output
    assert "ffi_call" in output  # by which ctypes calls the function that crashes
    assert "crashed at the same place 2 times" in output


def test_a_node_that_fails_the_preflight_check_is_named_and_excluded(start):
    """Two ranks on "two nodes", one of which cannot write, in the first attempt."""
    job = start(
        2,
        """
        os.environ["STROP_NODE"] = "node" + os.environ["STROP_RANK"]
        os.environ["STROP_LOCAL_RANK"] = "0"
        if os.environ["STROP_RANK"] == "1" and os.environ["STROP_ATTEMPT"] == "1":
            real = os.replace
            def replace(a, b, **kwargs):
                if "preflight" in str(a):
                    raise OSError(5, "Input/output error", str(a))
                return real(a, b, **kwargs)
            os.replace = replace
        """,
    )
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    first, second = attempts.read_all(RUN)
    assert (first["cause"], first["exclude"], second["cause"]) == ("startup", ["node1"], "done")
    assert "phase preflight" in output
    assert "node1 cannot use the run directory: [Errno 5] Input/output error" in output
    clock = json.loads((RUN / "logs/0002/clock.json").read_text())
    assert [entry["node"] for entry in clock["ranks"]] == ["node0", "node1"]
    assert all(abs(entry["offset_s"]) <= entry["error_s"] < 1 for entry in clock["ranks"])  # one clock
    assert "all-reduce of 4 MiB at" in output


def test_a_rank_with_a_slow_device_is_named(start):
    """Rank 1 needs 30 ms more for each block, where others need a few. All steps are equally long, and it
    uses no more CPU time than the others: only the wall time of its own work tells."""
    job = start(
        3,
        """
        if os.environ["STROP_RANK"] == "1":
            import time
            from transformers.models.llama.modeling_llama import LlamaAttention
            real = LlamaAttention.forward
            def forward(self, *args, **kwargs):
                time.sleep(0.03)
                return real(self, *args, **kwargs)
            LlamaAttention.forward = forward
        """,
        train={"max_steps": 35},
    )
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    told = [line for line in output.splitlines() if "slower than the median" in line]
    assert len(told) == 1
    assert re.search(r"rank 1 on \S+ is [\d.]+ x slower than the median for the last 30 steps$", told[0])
    windows = [json.loads(line) for line in (RUN / "timing.jsonl").read_text().splitlines()]
    assert [w["slowest_rank"] for w in windows if "slowest_rank" in w] == [1, 1, 1]
    assert all("slowest_rank" in w for w in windows if w["step"] % 10 == 0)
