"""The head's kernels beside their floor, the naive way and what others offer.

    python bench/kernels.py [--shape N,H,V ...] [--data FILE [--model DIR]] [--rounds 7]
                            [--peers [--env DIR]] [--json FILE]

For each shape, in bf16: log-probs of N targets from hidden states [N, H] and a weight [V, H] (forward), and
with the gradients of both (forward and backward). *matmul* is torch's own product of the same matrices in
chunks whose output stays in the cache: the floor of the forward. *naive* is log_softmax of fp32 logits.
All ways take turns in one process, a round each; a time is the median of the rounds, so ratios are of one
run. Extra memory is the growth of the peak of a process that does nothing else.

--data takes rows (JSONL with "text", "prompt" and "chosen", or "question" and "answer") through --model's
tokenizer and decoder, so that the logits are real ones; without it rows are random. --peers installs trl
and liger-kernel into an environment of their own, if they are not there; they run there, on the same shapes,
against the naive way there.

The naive forward over the matmul is the most that any head could gain here, and forward and backward over
three matmuls likewise: on a CPU whose matmul is slow beside its memory, that is little.

Targets: forward at most 1.35 x the matmul and 3.5 x faster than naive, forward and backward 1.8 x
faster, at most 64 MiB extra in the forward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src"), str(REPO)]

from bench import peers, processes  # noqa: E402
from bench.results import write  # noqa: E402
from strop import ops  # noqa: E402
from strop.ops import head  # noqa: E402
from tools import command_line  # noqa: E402

SHAPES = ((1024, 896, 151936), (1024, 576, 49152), (1024, 256, 32000))
"""Of Qwen2.5-0.5B, of SmolLM2-135M and of bench/step.py's small model."""
MATMUL_WORDS = 2048
"""Words of a chunk whose logits stay in the cache."""
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_rows(num_tokens: int, hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a standard deviation of 2, made piece by piece: the peak must not be the making."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab, hidden, dtype=torch.bfloat16)
    for part in weight.split(4096):
        part.copy_(torch.randn(part.shape, generator=generator) * 2 / hidden**0.5)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    return x, weight, torch.randint(vocab, (num_tokens,), generator=generator)


def real_rows(file: Path, model_dir: Path, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states before the head and the tokens that follow, of the file's first rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    states, targets, count = [], [], 0
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row.get("text") or row.get("question") or row["prompt"]
        tokens = tokenizer(text + row.get("chosen", row.get("answer", "")), return_tensors="pt").input_ids
        with torch.no_grad():
            states.append(model.base_model(tokens).last_hidden_state[0, :-1])
        targets.append(tokens[0, 1:])
        count += len(targets[-1])
        if count >= num_tokens:
            break
    weight = model.get_output_embeddings().weight.detach().clone()
    return torch.cat(states)[:num_tokens].clone(), weight, torch.cat(targets)[:num_tokens].clone()


# ---- The ways


def strop_way(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ops.linear_logprob(x, weight, target)[0]


def naive(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax((x @ weight.t()).float(), dim=-1).gather(1, target[:, None])[:, 0]


def selective(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """TRL's formula for 16-bit logits: a log_softmax in the logits' type, row by row."""
    rows = zip(x @ weight.t(), target)
    return torch.stack([F.log_softmax(row, dim=-1)[t] for row, t in rows])


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.linear_cross_entropy(x, weight, target, reduction="none")


def matmul(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    buffer = x.new_empty(len(x) * MATMUL_WORDS)
    for part in weight.split(MATMUL_WORDS):
        torch.mm(x, part.t(), out=buffer[: len(x) * len(part)].view(len(x), len(part)))
    return buffer


def forward(way: Way, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        way(*rows)


def both(way: Way, rows: tuple[Tensor, Tensor, Tensor], frozen: bool = False) -> None:
    x, weight = rows[0].detach().requires_grad_(), rows[1].detach().requires_grad_(not frozen)
    way(x, weight, rows[2]).sum().backward()


def recompute(way: Way, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """The memory mode: nothing of the logits is kept for the backward."""
    budget, head.KEPT_BYTES = head.KEPT_BYTES, 0
    try:
        both(way, rows)
    finally:
        head.KEPT_BYTES = budget


def all_ways(slow: bool) -> dict[str, Callable[[tuple[Tensor, Tensor, Tensor]], None]]:
    """Name -> what is timed. `slow`: those that take ten times the naive way's time too."""
    ways: dict[str, Callable[[Any], None]] = {
        "matmul": lambda rows: forward(matmul, rows),
        "strop forward": lambda rows: forward(strop_way, rows),
        "naive forward": lambda rows: forward(naive, rows),
        "selective forward": lambda rows: forward(selective, rows),
        "strop both": lambda rows: both(strop_way, rows),
        "strop both, recompute": lambda rows: recompute(strop_way, rows),
        "strop both, frozen": lambda rows: both(strop_way, rows, frozen=True),
        "naive both": lambda rows: both(naive, rows),
        "naive both, frozen": lambda rows: both(naive, rows, frozen=True),
    }
    if slow and hasattr(F, "linear_cross_entropy"):
        ways["F.linear_cross_entropy forward"] = lambda rows: forward(linear_cross_entropy, rows)
    return ways


def median_times(ways: dict[str, Any], rows: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Seconds of each, taking turns; one round more, which is not counted, comes first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way(rows)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


# ---- Memory, accuracy, peers


def extra_memory(shape: tuple[int, int, int]) -> dict[str, float]:
    """MiB that a way adds to the peak of a process that holds the rows; each in a process of its own."""
    out = {}
    for name in ("strop forward", "strop both", "strop both, recompute", "naive forward", "naive both"):
        command = [sys.executable, __file__, "--memory-of", name, "--shape", ",".join(map(str, shape))]
        out[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return out


def print_memory(name: str, shape: tuple[int, int, int]) -> None:
    """In the child: a small run first, so that what libraries allocate once is not counted."""
    rows, way = random_rows(*shape), all_ways(slow=False)[name]
    way((rows[0][:2], rows[1][:64], rows[2][:2] % 64))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = processes.kib(os.getpid(), "VmRSS")
    way(rows)
    print((processes.kib(os.getpid(), "VmHWM") - before) / 1024)


def accuracy(rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, dict[str, float]]:
    """Largest error of a token and of the sum over all, in nats, against fp64 of the same bf16 inputs."""
    x, weight, target = rows
    right = torch.cat([naive_fp64(x[i : i + 64], weight, target[i : i + 64]) for i in range(0, len(x), 64)])
    out = {}
    for name, way in (("strop", strop_way), ("naive", naive), ("selective", selective)):
        with torch.no_grad():
            error = way(x, weight, target).double() - right
        out[name] = {"token": float(error.abs().max()), "sum": float(error.sum().abs())}
    return out


def naive_fp64(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    z = torch.cat([x.double() @ part.double().t() for part in weight.split(16384)], dim=1)
    return torch.log_softmax(z, 1).gather(1, target[:, None])[:, 0]


def peer_times(python: Path, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """What bench/kernels_peers.py of the other environment says; {} for a peer that does not run there."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [str(python), str(REPO / "bench/kernels_peers.py"), *map(str, shape), str(rounds), out.name]
        subprocess.run(command, check=True)
        return json.loads(Path(out.name).read_text(encoding="utf-8"))


# ---- The report


def ratios(times: dict[str, float]) -> dict[str, float]:
    t = times
    return {
        "forward_over_matmul": t["strop forward"] / t["matmul"],
        # The most that any forward could gain over the naive one here, and any forward and backward.
        "naive_forward_over_matmul": t["naive forward"] / t["matmul"],
        "naive_both_over_3_matmuls": t["naive both"] / (3 * t["matmul"]),
        "forward_speedup_over_naive": t["naive forward"] / t["strop forward"],
        "forward_speedup_over_selective": t["selective forward"] / t["strop forward"],
        "both_speedup_over_naive": t["naive both"] / t["strop both"],
        "both_recompute_speedup_over_naive": t["naive both"] / t["strop both, recompute"],
        "both_frozen_speedup_over_naive": t["naive both, frozen"] / t["strop both, frozen"],
    }


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    rows = random_rows(*shape) if args.data is None else real_rows(args.data, args.model, shape[0])
    vocab, hidden = rows[1].shape
    shape = (len(rows[0]), hidden, vocab)
    times = median_times(all_ways(slow=args.slow), rows, args.rounds)
    result = {"shape": shape, "seconds": times, **ratios(times)}
    result["matmul_gflops"] = 2 * shape[0] * shape[1] * shape[2] / times["matmul"] / 1e9
    result["error_nats"] = accuracy(rows)
    del rows
    result["extra_mib"] = extra_memory(shape)
    if args.peers:
        result["peers"] = peer_times(peers.interpreter(args.env), shape, args.rounds)
    return result


def show(result: dict[str, Any]) -> None:
    n, h, v = result["shape"]
    print(f"N={n} H={h} V={v} bf16, matmul {result['matmul_gflops']:.0f} GFLOP/s")
    for name, seconds in result["seconds"].items():
        over = seconds / result["seconds"]["matmul"]
        extra = result["extra_mib"].get(name)
        print(
            f"  {name:32s}{seconds * 1e3:9.1f} ms {over:7.2f} x matmul"
            + (f"{extra:9.0f} MiB extra" if extra is not None else "")
        )
    for name, value in result.items():
        if "_over_" in name:
            print(f"  {name:38s}{value:7.2f}")
    for name, error in result["error_nats"].items():
        print(f"  error of {name:22s} {error['token']:.1e} nats a token, {error['sum']:.1e} on the sum")
    for name, numbers in result.get("peers", {}).items():
        print(f"  {name}: {numbers}")


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    cpu = torch.device("cpu")
    return {
        "cpu": name,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": ops.backend(cpu, torch.bfloat16),
        "load_before": os.getloadavg()[0],
    }


def parse(words: Optional[list[str]] = None) -> argparse.Namespace:
    def shape(text: str) -> tuple[int, ...]:
        return tuple(int(x) for x in text.split(","))

    parser = command_line.command_parser(__doc__)
    parser.add_argument("--shape", type=shape, action="append", help="N,H,V; more than once")
    parser.add_argument("--data", type=Path, help="rows for real hidden states")
    parser.add_argument("--model", type=Path, default=REPO / "assets/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow", action="store_true", help="F.linear_cross_entropy too")
    parser.add_argument("--peers", action="store_true", help="TRL's and Liger's ways too")
    parser.add_argument("--env", type=Path, default=peers.ENV, help="their environment (made if missing)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    shapes = args.shape or list(SHAPES)
    if args.memory_of:
        print_memory(args.memory_of, shapes[0])
        return
    results = []
    about = machine()
    for shape in shapes[:1] if args.data else shapes:
        results.append(measure(shape, args))
        show(results[-1])
    if args.json:
        first = {name: value for name, value in results[0].items() if "_over_" in name}
        write(args.json, {**about, **first, "command": sys.argv, "shapes": results})


if __name__ == "__main__":
    command_line.run(main)
