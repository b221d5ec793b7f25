"""Run directories of many ranks, written by hand in the format on disk: records, clocks, logs, verdicts, and
the job's output in srun's words. Whom and what the test strikes is the truth that the reader must find.

Node n's clock is SKEW_S[n % 5] ahead of node 0's, and every time written down is by the writer's own clock.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from strop.obs import log_line
from strop.slurm import attempts, body, env

T = 1_795_000_000.0
"""2026-11-18 12:26:40 UTC: the first attempt begins."""
SKEW_S = (0.0, 0.8, -1.7, 3.1, -0.4)
PHASES = (("start", 2.0), ("preflight", 3.0), ("data", 4.0), ("rendezvous", 9.0), ("model", 11.0),
          ("resume", 30.0), ("train", 41.0))  # fmt: skip
"""When the phases begin, in seconds after the attempt."""
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.1.0.{}]:4711"
NCCL_TIMEOUT = (
    "[Rank {0}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=812, OpType=ALLREDUCE, "
    "NumelIn=4194304, Timeout(ms)=600000) ran for 600021 milliseconds before timing out."
)
TRACE = """Traceback (most recent call last):
  File "/repo/src/strop/train.py", line 88, in _train
    loop.train(run, config, position)
  File "/repo/src/strop/loop.py", line 118, in _run_steps
    if not _step(t, batches, data_s) or not _after_step(t):
  File "/repo/src/strop/loop.py", line 165, in _step
    loss, metrics = _forward(t, batch)
  File "/repo/src/strop/{place}
{error}
"""


class Made:
    """A run directory in the making."""

    def __init__(self, root: Path, ranks: int = 512, per_node: int = 8, max_steps: int = 400) -> None:
        self.dir = root / "runs" / "big"
        self.output = root / "dpo-812.out"
        self.output.touch()
        self.num_ranks, self.per_node = ranks, per_node
        self.nodes = [f"gpu{n:03d}" for n in range(ranks // per_node)]
        (self.dir / "attempts").mkdir(parents=True)
        (self.dir / "config.yaml").write_text(
            f"algo: dpo\nmodel: {{path: meta/demo-8b}}\ntrain: {{max_steps: {max_steps}, "
            "global_batch_size: 512}\noptim: {lr: 5.0e-07}\nlog: {every: 1}\n"
            "validation: {every: 100, at_start: false, at_end: true}\nmetadata: {api_key: s3cr3t-value}\n"
        )
        self.draw = random.Random(7)
        self.attempt = 0

    def node(self, rank: int) -> str:
        return self.nodes[rank // self.per_node]

    def skew_s(self, rank: int) -> float:
        return SKEW_S[rank // self.per_node % len(SKEW_S)]

    def begin(self, at_s: float = 0.0, **facts: Any) -> None:
        """Another attempt, whose ranks have met: record, clock.json, present marks."""
        self.attempt += 1
        self.began = T + at_s
        record = {
            **{"attempt": self.attempt, "state": "X", "job_id": "812", "target": "812", "algo": "dpo"},
            **{"restart_count": self.attempt - 1, "host": "gpu000", "pid": 4242, "nodes": self.nodes},
            **{"began": self.began, "committed_step": attempts.committed_step(self.dir), "launcher": "slurm"},
            **{"args": ["optim.lr=5e-7", "run.name=big"], "oom_kills": 0},
            **{"output": [str(self.output), self.output.stat().st_size]},
            **{"machine": {"device": "H100", "ranks": self.num_ranks}, **facts},
        }
        attempts.record_file(self.dir, self.attempt).write_text(json.dumps(record))
        self.logs = attempts.log_dir(self.dir, self.attempt)
        self.logs.mkdir(parents=True)
        ranks = [
            {"rank": r, "node": self.node(r), "offset_s": self.skew_s(r), "error_s": 0.0004}
            for r in range(self.num_ranks)
        ]
        (self.logs / "clock.json").write_text(json.dumps({"reference_rank": 0, "ranks": ranks}))

    def log(self, rank: int, after_s: float, phase: str, message: str, **fields: Any) -> bytes:
        """A line as the writer makes it, at its own clock."""
        at = datetime.fromtimestamp(self.began + after_s + self.skew_s(rank), timezone.utc)
        line = {
            **{"time": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "rank": rank, "node": self.node(rank)},
            **{"attempt": self.attempt, "step": fields.pop("step", None), "phase": phase},
            **{"level": fields.pop("level", "INFO"), "logger": "strop", "message": message, **fields},
        }
        return log_line.encode(line)

    def live(
        self, until_s: float, steps: Sequence[int], silent: Optional[Mapping[int, float]] = None
    ) -> None:
        """Every rank writes its phases and steps up to `until_s`; those in `silent` stop earlier."""
        for rank in range(self.num_ranks):
            stop_s = (silent or {}).get(rank, until_s)
            jitter = self.draw.random() * 0.02
            lines = [
                self.log(
                    rank, begin_s + jitter, phase, f"{phase} ...", step=steps[0] if phase == "train" else None
                )
                for phase, begin_s in PHASES
                if begin_s < stop_s
            ]
            per_step = (until_s - 42.0) / len(steps)
            for i, step in enumerate(steps):
                after_s = 42.0 + i * per_step + jitter
                if after_s < stop_s and (i > len(steps) - 4 or rank == 0):
                    phase = "validation" if step % 100 == 0 else "save" if step % 50 == 0 else "train"
                    lines.append(self.log(rank, after_s, phase, f"step {step} done", step=step))
            (self.logs / f"rank{rank:05d}.jsonl").write_bytes(b"".join(lines))
            (self.logs / f"rank{rank:05d}.err").write_text("")

    def append(self, rank: int, line: bytes) -> None:
        with open(self.logs / f"rank{rank:05d}.jsonl", "ab") as file:
            file.write(line)

    def stderr(self, rank: int, text: str) -> None:
        (self.logs / f"rank{rank:05d}.err").write_text(text)

    def verdict(
        self, rank: int, after_s: float, kind: str, message: str, exception: Optional[str] = None,
        traceback: Optional[str] = None, step: Optional[int] = 120, phase: str = "train",
    ) -> None:  # fmt: skip
        if exception and not traceback:
            place = 'dist.py", line 52, in sum\n    td.all_reduce(total)'
            traceback = TRACE.format(place=place, error=f"{exception}: {message}")
        made = {
            **{"rank": rank, "node": self.node(rank), "kind": kind, "exit_code": 1, "message": message},
            **{"exception": exception, "traceback": traceback, "step": step, "phase": phase},
            **{"time": self.began + after_s + self.skew_s(rank)},
            "fingerprint": attempts.fingerprint(exception or kind, traceback or message),
        }
        (self.logs / f"verdict-{rank:05d}.json").write_text(json.dumps(made, indent=1) + "\n")
        if exception:
            self.append(
                rank, self.log(rank, after_s, phase, f"{exception}: {message}", step=step, level="ERROR")
            )

    def follow(self, ranks: Sequence[int], after_s: float, text: str = GLOO) -> None:
        for rank in ranks:
            later_s = after_s + self.draw.random() * 0.2
            self.verdict(rank, later_s, "peer", text.format(rank % 200), "RuntimeError")

    def srun(self, *lines: str) -> None:
        with open(self.output, "a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def metrics(self, steps: Sequence[int], per_step_s: float) -> None:
        """Of these steps, as the current attempt's."""
        with open(self.dir / "metrics.jsonl", "a") as file, open(self.dir / "timing.jsonl", "a") as timing:
            for i, step in enumerate(steps):
                noise = self.draw.random()
                line: dict[str, Any] = {
                    **{"step": step, "epoch": step / 400, "loss": 0.25 + 0.44 * 0.99**step + 0.05 * noise},
                    **{"grad_norm": 1.0 + noise, "learning_rate": 5e-7 * min(1.0, step / 20)},
                    **{"rewards/accuracies": 0.5 + 0.3 * (1 - 0.985**step) + 0.1 * noise},
                    **{"rewards/margins": 0.01 * step + 0.3 * noise},
                }
                file.write(json.dumps(line) + "\n")
                if step % 100 == 0:
                    value = 0.3 + 0.4 * 0.99**step
                    line = {"step": step, "eval_loss": value, "eval_rewards/margins": 0.01 * step}
                    file.write(json.dumps(line) + "\n")
                took = {
                    **{"step": step, "time": self.began + 42.0 + (i + 1) * per_step_s, "step_s": per_step_s},
                    **{"tokens_per_s": 1.9e6 + 2e5 * noise, "mem_peak_gib": 61.2, "attempt": self.attempt},
                }
                timing.write(json.dumps(took) + "\n")

    def commit(self, step: int) -> None:
        folder = self.dir / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "COMMITTED.json").write_text("{}")

    def close(self, launcher_exit: int, after_s: float, **facts: Any) -> None:
        """The job body's own end decides, as after a run of the local launcher."""
        job = env.Job(None, None, None, self.attempt - 1, tuple(self.nodes), "local", self.dir, self.attempt,
                      None, None)  # fmt: skip
        body.end(job, launcher_exit, ())
        attempts.update(self.dir, self.attempt, closed=self.began + after_s, **facts)
