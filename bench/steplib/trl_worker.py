"""Whole optimiser steps of TRL on the CPU, in an interpreter that has it: `python trl_worker.py SPEC.json`.

The spec names algorithm, model, rows in training order, batch, steps, learning rate, threads and whether TRL
runs "as it comes" or at its "best". Writes [{"seconds", "loss"}], one a step, to the spec's "out".
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    # Every default but the precision: with bf16 nobody's losses could be compared.
    "as it comes": {"bf16": False},
    # fp32 master weights, as strop has them.
    "best": {"bf16": True, "gradient_checkpointing": False},
}


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self.begin)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    base: type = DPOTrainer if spec["algo"] == "dpo" else SFTTrainer
    losses: list[float] = []

    class InOrder(base):
        """Rows in file order, and the loss before it is rounded for the log."""

        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().compute_loss(*args, **kwargs)
            losses.append(float((out[0] if isinstance(out, tuple) else out).detach()))
            return out

    settings = dict(SETTINGS[spec["settings"]])
    if spec["algo"] == "dpo" and spec["settings"] == "best":
        settings |= {"precompute_ref_log_probs": True}
    make = DPOConfig if spec["algo"] == "dpo" else SFTConfig
    config = make(
        output_dir=spec["folder"],
        use_cpu=True,
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        **settings,
    )
    rows = load_dataset("json", data_files=spec["rows"], split="train", cache_dir=spec["folder"])
    watch = Stopwatch()
    InOrder(model=spec["model"], args=config, train_dataset=rows, callbacks=[watch]).train()
    steps = [{"seconds": s, "loss": loss} for s, loss in zip(watch.seconds, losses, strict=True)]
    Path(spec["out"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
