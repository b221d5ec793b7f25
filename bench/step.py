"""Whole optimiser steps of DPO and SFT on this machine's CPU, beside a peer: rows a second and peak memory.

    python bench/step.py --peer trl [--json FILE] [--data FILE] [--model DIR] [--only dpo] [--rounds 3]

Two models: SmolLM2-135M (`python -m tools.demo_assets` makes it) on chat pairs of GSM8K's length (or the
rows of --data, e.g. made by bench/gsm8k_pairs.py), and a small one (4 layers of 256) with 32,000 words. Both
sides train the same rows in the same order from the same weights with the same optimiser, and their losses
are compared step by step: in fp32 they must agree to 1e-4.

Sides: strop as its users run it (bf16 where the CPU has it; one rank with all threads, and one rank a thread)
and in fp32; TRL as it comes, in fp32; and TRL at its best: bf16, reference log-probs computed before
training, no activation checkpointing. Both sides' reference passes are outside of the steps that are timed.
In every round each side trains in a new process, one after the other; the first step of each is not counted.
The speed-ups are ratios of medians over all other steps; the one of TRL's best is against the faster of the
two ways to run strop. Peak memory is that of the whole process tree, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "src")]  # run uninstalled

import numpy as np  # noqa: E402

from bench import peers  # noqa: E402
from bench.results import write  # noqa: E402
from bench.steplib import inputs, sides  # noqa: E402
from bench.steplib.sides import Job, Outcome, Side  # noqa: E402
from strop.data import plan  # noqa: E402

SAME_LOSS = 1e-4
LR = 2e-5


def main() -> int:
    args = parse_args()
    python = peers.interpreter(args.env)
    result: dict[str, Any] = {"machine": machine(), "packing": packing()}
    print(json.dumps(result["machine"]), *packing_lines(result["packing"]), sep="\n", flush=True)
    good = True
    with tempfile.TemporaryDirectory(prefix="strop-step-") as name:
        folder = Path(name)
        num_rows = args.batch * args.steps
        tasks = [inputs.smollm2(args.model.resolve(), args.data, num_rows), inputs.small(folder, num_rows)]
        for task in tasks:
            for algo in ("dpo", "sft"):
                if args.only and f"{task.name}-{algo}".find(args.only) < 0:
                    continue
                case = measure(task, algo, args, folder, python)
                good &= case["same_loss"]
                result.setdefault("cases", {})[f"{task.name}-{algo}"] = case
                result |= headline(result["cases"])
                if args.json:
                    write(args.json, result)
    return 0 if good else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    repo = Path(__file__).resolve().parents[1]
    parser.add_argument("--peer", choices=["trl"], default="trl")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--data", type=Path, help="preference rows for SmolLM2 (JSON lines)")
    parser.add_argument("--model", type=Path, default=repo / "assets/smollm2-135m-instruct")
    parser.add_argument("--only", help="the cases whose name holds this, e.g. smollm2-135m-dpo, sft or small")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each process (default 4)")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step (default 4)")
    parser.add_argument("--env", type=Path, default=peers.ENV, help="TRL's environment (made if missing)")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"--model: no model in {args.model}; python -m tools.demo_assets makes it")
    return args


def measure(
    task: inputs.Task, algo: str, args: argparse.Namespace, folder: Path, python: Path
) -> dict[str, Any]:
    """All sides of one case, interleaved."""
    threads = len(os.sched_getaffinity(0))
    ours, ordered = inputs.write_rows(task, algo, args.batch, folder)
    job = Job(task, algo, ours, ordered, args.batch, args.steps, LR, folder, threads)
    ways = [Side("strop", "auto"), Side("strop, a rank a thread", "auto", ranks=threads)]
    ways += [Side("trl", "fp32", settings="as it comes"), Side("trl best", "bf16", settings="best")]
    check = sides.train(Side("strop fp32", "fp32"), job, python)
    found: dict[str, list[Outcome]] = {way.name: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            found[way.name].append(sides.train(way, job, python))
    case = {name: figures(outcomes, args.batch) for name, outcomes in found.items()}
    case["strop fp32"] = figures([check], args.batch)
    truth = found["trl"][0].losses
    for one in case.values():
        one["loss_error"] = max(abs(a - b) for a, b in zip(one["losses"], truth, strict=True))
    case["same_loss"] = case["strop fp32"]["loss_error"] <= SAME_LOSS
    show(f"{task.name} {algo}", case)
    return case


def figures(outcomes: list[Outcome], batch: int) -> dict[str, Any]:
    seconds = [s for outcome in outcomes for s in outcome.seconds[1:]]
    return {
        "step_s": statistics.median(seconds),
        "rows_per_s": batch / statistics.median(seconds),
        "peak_gib": statistics.median(outcome.peak_gib for outcome in outcomes),
        "losses": outcomes[0].losses,
        "all_step_s": seconds,
    }


def show(title: str, case: dict[str, Any]) -> None:
    print(f"\n{title:28} {'rows/s':>8} {'peak GiB':>9} {'loss error':>11}")
    for name, one in case.items():
        if name != "same_loss":
            rate, peak, error = one["rows_per_s"], one["peak_gib"], one["loss_error"]
            print(f"  {name:26} {rate:8.3f} {peak:9.2f} {error:11.1e}")
    print("  losses agree in fp32" if case["same_loss"] else "  LOSSES DIFFER in fp32", flush=True)


def headline(cases: dict[str, Any]) -> dict[str, float]:
    """The ratios by the names that others read: of SmolLM2 without, of the small model with its suffix."""
    out = {}
    for name, case in cases.items():
        task, _, algo = name.rpartition("-")
        suffix = "" if task.startswith("smollm2") else "_small"
        strop = max(case["strop"], case["strop, a rank a thread"], key=lambda way: way["rows_per_s"])
        for peer, key in (("trl", "trl"), ("trl best", "trl_best")):
            out[f"{algo}_speedup_over_{key}{suffix}"] = strop["rows_per_s"] / case[peer]["rows_per_s"]
            out[f"{algo}_memory_over_{key}{suffix}"] = strop["peak_gib"] / case[peer]["peak_gib"]
    return out


def packing() -> dict[str, Any]:
    """Fill and balance of plan.pack on lengths like those of instruction data, and what it costs."""
    lengths = np.random.default_rng(0).lognormal(mean=6.0, sigma=0.7, size=100_000).astype(int).clip(16, 4096)
    out: dict[str, Any] = {}
    for num_rows in (512, 4096):
        rows = plan.step_rows(len(lengths), num_rows, inputs.SEED, 0)
        begin = time.perf_counter()
        ranks = plan.pack(rows, lengths, world_size=8, max_tokens=8192)
        seconds = time.perf_counter() - begin
        tokens = [[int(lengths[b].sum()) for b in own] for own in ranks]
        cost = lengths + lengths**2 / plan.ATTENTION_LENGTH
        costs = [sum(float(cost[b].sum()) for b in own) for own in ranks]
        out[str(num_rows)] = {
            "fill": sum(map(sum, tokens)) / (8192 * sum(map(len, tokens))),
            "slowest_over_mean": max(costs) / statistics.mean(costs),
            "pack_s": seconds,
        }
    return out


def packing_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"plan.pack, {rows} rows, 8 ranks, bins of 8,192 tokens: filled to {one['fill']:.1%}, the slowest "
        f"rank {one['slowest_over_mean'] - 1:.2%} above the mean, {1e3 * one['pack_s']:.0f} ms"
        for rows, one in found.items()
    ]


def machine() -> dict[str, Any]:
    import torch

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "trl": peers.TRL,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
