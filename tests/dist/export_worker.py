"""One rank that shards known weights with FSDP2 and commits them as a checkpoint (see test_export.py).

    python export_worker.py RUNS NAME:STEP [NAME:STEP ...]

Reads RUNS/NAME/truth.pt and the model's configuration from RUNS/NAME/base; every case takes the same
process group, since importing torch is what such a test costs.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from strop import checkpoint, dist
from strop.config import DistConfig
from strop.models.hf import distinct_state
from strop.slurm.env import read_env
from strop.slurm.stop import StopRequest


def main(runs: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    group = dist.start(DistConfig(), read_env(), runs, 1, StopRequest(runs, 1))
    for case in cases:
        name, step = case.split(":")
        config = AutoConfig.from_pretrained(runs / name / "base")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(torch.load(runs / name / "truth.pt", mmap=True))
        for block in model.model.layers:
            fully_shard(block, mesh=group.mesh)
        fully_shard(model, mesh=group.mesh)
        weights = distinct_state(model)
        tensors = {f"model.{key}": value.detach() for key, value in weights.items()}
        # The optimiser's moments lie beside the weights and must not be exported.
        tensors |= {f"optim.{key}.exp_avg": torch.zeros_like(value) for key, value in weights.items()}
        checkpoint.save(runs / name / "checkpoints", int(step), 1, tensors, {"step": int(step)}, group)
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
