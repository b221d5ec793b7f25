"""Where people look at the numbers: TensorBoard, Weights & Biases, MLflow.

Each record of metrics.jsonl goes to every sink that was asked for: `loss` as `train/loss`, `eval_loss` as
`eval/loss`. A resumed run goes on in the same place: TensorBoard is told to forget the steps after the
committed one, the trackers' run ids lie in the run directory. Only rank 0 opens sinks. Only a missing
package is an error, at the start; a tracker that fails later (network) is reported once and left out.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Protocol

from strop.errors import UserError

log = logging.getLogger(__name__)
MLFLOW_LONGEST = 6000
"""MLflow refuses longer parameters."""


class Sink(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(*, tensorboard: bool, wandb: bool, mlflow: bool) -> None:
    """UserError if a sink is asked for whose package is missing."""
    for key, package, wanted in (
        ("log.tensorboard", "tensorboard", tensorboard),
        ("log.wandb", "wandb", wandb),
        ("log.mlflow", "mlflow", mlflow),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{key} is true, but the Python package {package} is not installed: "
                f"pip install {package}, or {key}=false"
            )


def shown(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers under the names that dashboards show."""
    names = {}
    for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)):
            names[f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"] = float(value)
    return names


class Sinks:
    """All sinks of a run. `resumed_from`: the committed step that a resumed run goes on from, else None."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb: bool,
        mlflow: bool,
        project: str,
        config: Mapping[str, Any],
        resumed_from: Optional[int] = None,
    ):
        check_installed(tensorboard=tensorboard, wandb=wandb, mlflow=mlflow)
        self._sinks: dict[str, Sink] = {}
        if tensorboard:
            self._try("tensorboard", lambda: self._add("tensorboard", TensorBoard(run_dir, resumed_from)))
        if wandb:
            self._try("wandb", lambda: self._add("wandb", Wandb(run_dir, project, config)))
        if mlflow:
            self._try("mlflow", lambda: self._add("mlflow", MLflow(run_dir, project, config)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of metrics.jsonl."""
        values = shown(record)
        for name, sink in list(self._sinks.items()):
            self._try(name, lambda sink=sink: sink.log(int(record["step"]), values))

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)

    def _add(self, name: str, sink: Sink) -> None:
        self._sinks[name] = sink

    def _try(self, name: str, action: Any) -> None:
        # Any exception: trackers raise their own types, and none of them may end a training run.
        try:
            action()
        except Exception as e:
            self._sinks.pop(name, None)
            log.warning("%s failed and gets nothing more in this attempt: %s: %s", name, type(e).__name__, e)


class TensorBoard:
    """Event files in <run>/tensorboard, one an attempt."""

    def __init__(self, run_dir: Path, resumed_from: Optional[int]):
        # Not by runs that do without: it takes 12 MiB.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        if resumed_from is not None:
            # A START with a step makes readers drop what earlier files have from this step on.
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(session_log=session, step=resumed_from + 1))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary.Summary
        scalars = [summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(self._event.Event(summary=summary(value=scalars), step=step))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)
        # Now, not in ten seconds: a step that was committed before a kill is not written again.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; the same one after a resume."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]):
        import wandb

        id_file = run_dir / "wandb.id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # After a resume the tracker may be ahead by steps that were not committed. It refuses to go back,
        # and need not: a repeated step has the same values.
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; the same one after a resume."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        id_file = run_dir / "mlflow.id"
        if id_file.exists():
            mlflow.start_run(run_id=id_file.read_text().strip())
            return
        run = mlflow.start_run(run_name=run_dir.name)
        mlflow.log_params({section: json.dumps(keys)[:MLFLOW_LONGEST] for section, keys in config.items()})
        id_file.write_text(run.info.run_id + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()
