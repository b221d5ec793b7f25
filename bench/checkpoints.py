"""What a checkpoint costs training: the stall of a save in the background, beside synchronous saves.

    python bench/checkpoints.py [--model DIR] [--steps 101] [--every 20] [--json FILE]

Trains a model (default: of the shape of SmolLM2-135M, with random weights, made here) with DPO on generated
rows, two ranks on this machine, once with saves in the background and once without, and times the synchronous
`torch.distributed.checkpoint.save` of tensors of the same sizes (it neither hashes nor syncs to disk).
The share is the time that training stood still for saves over the time of all steps. Target: under 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "src")]  # run uninstalled

from bench.results import write  # noqa: E402

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
}
RANKS = 2


def make_model(folder: Path) -> None:
    """A random Llama and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(5000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, **SHAPE)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(path: Path) -> None:
    """Pairs of ten words a side."""
    draw = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(f"w{draw.randrange(5000)}" for _ in range(num_words))

    rows = [{"prompt": text(5) + " ", "chosen": text(10), "rejected": text(10)} for _ in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(
    folder: Path, model: Path, name: str, background: bool, steps: int, every: int
) -> list[dict[str, Any]]:
    """The lines of timing.jsonl of one run."""
    words = [
        f"model.path={model}",
        f"data.train={folder / 'training.jsonl'}",
        f"run.dir={folder / 'runs'}",
        f"run.name={name}",
        f"train.max_steps={steps}",
        "train.global_batch_size=8",
        f"checkpoint.every={every}",
        "checkpoint.best_metric=null",  # there is no validation set
        f"checkpoint.async={str(background).lower()}",
        "log.tensorboard=false",
    ]
    environment = {
        **os.environ,
        "STROP_LAUNCHER": "local",
        "STROP_LOCAL_RANKS": str(RANKS),
        "PYTHON": sys.executable,
    }
    command = ["bash", str(REPO / "sbatch/lib.sh"), "dpo", "--config", str(REPO / "configs/dpo.yaml"), *words]
    with open(folder / f"{name}.log", "w") as log:
        code = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder
        ).returncode
    if code:
        sys.exit(f"the run failed (exit code {code}):\n" + (folder / f"{name}.log").read_text()[-2000:])
    return [json.loads(line) for line in (folder / "runs" / name / "timing.jsonl").read_text().splitlines()]


def shapes_of(model: Path) -> list[list[int]]:
    """Of the weights in an HF directory."""
    found = []
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            found += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return found


def plain_dcp(rank: int, folder: str, shapes: list[list[int]], port: int, repeats: int, out: Any) -> None:
    """Seconds of synchronous `dcp.save` of weights and both moments, fp32, sharded over the ranks."""
    store = td.TCPStore("127.0.0.1", port, RANKS, rank == 0)
    td.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = {
        f"{kind}.{i}": distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
        for kind in ("weight", "moment1", "moment2")
        for i, shape in enumerate(shapes)
    }
    seconds = []
    for i in range(repeats):
        td.barrier()
        begin = time.monotonic()
        dcp.save(tensors, checkpoint_id=f"{folder}/plain-{i}")
        td.barrier()
        seconds.append(time.monotonic() - begin)
    if rank == 0:
        out.put(seconds)
    td.destroy_process_group()


def measure_plain(folder: Path, model: Path, repeats: int = 5) -> list[float]:
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        plain_dcp, (str(folder), shapes_of(model), port, repeats, out), RANKS, start_method="spawn"
    )
    return out.get()


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Stall a save (median, seconds), its share of the training time, and the median step."""
    stalls = [line["save_stall_s"] for line in lines if line["save_stall_s"] > 0]
    total = sum(line["step_s"] + line["save_stall_s"] for line in lines)
    return {
        "saves": len(stalls),
        "stall_s": statistics.median(stalls),
        "share": sum(stalls) / total,
        "step_s": statistics.median(line["step_s"] for line in lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an HF directory, with a tokenizer")
    parser.add_argument("--steps", type=int, default=101)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model.resolve() if args.model else folder / "model"
        if not args.model:
            make_model(model)
        make_rows(folder / "training.jsonl")
        figures: dict[str, Any] = {
            "background": summary(train(folder, model, "background", True, args.steps, args.every)),
            "synchronous": summary(train(folder, model, "synchronous", False, args.steps, args.every)),
        }
        plain = measure_plain(folder, model)
    figures["plain_dcp_save_s"] = statistics.median(plain)
    step_s = figures["synchronous"]["step_s"]
    figures["plain_dcp_share"] = figures["plain_dcp_save_s"] / (
        args.every * step_s + figures["plain_dcp_save_s"]
    )
    print(f"{'':24} {'stall a save':>14} {'share of time':>14} {'median step':>12}")
    for kind in ("background", "synchronous"):
        f = figures[kind]
        print(f"strop, {kind:17} {f['stall_s']:12.3f} s {f['share']:13.2%} {f['step_s']:10.2f} s")
    print(f"{'dcp.save alone':24} {figures['plain_dcp_save_s']:12.3f} s {figures['plain_dcp_share']:13.2%}")
    if args.json:
        write(args.json, figures)


if __name__ == "__main__":
    main()
