"""How many steps the quickstart can afford on this machine.

    python -m tools.quickstart_scale --model DIR --seconds S --most N      prints STEPS and a remark

A step's cost is about 2 x parameters x tokens x (1 forward + 2 backward) floating-point operations. One
second of bf16 matrix products with the model's own shapes on all cores gives the speed; a training step on
an idle machine was measured to reach nearly that (SHARE leaves some room). A machine that is too slow for
`most` steps makes fewer, never below LEAST.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tools.command_line import command_parser, run

LEAST = 8
TOKENS_A_STEP = 2100
SHARE = 0.8


def matmul_flops(width: int, inner: int) -> float:
    """bf16 floating-point operations a second: [2048, width] x [width, inner]."""
    import torch

    a, b = torch.randn(2048, width).bfloat16(), torch.randn(width, inner).bfloat16()
    a @ b  # the first product sets up its kernel
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        a @ b
        done += 1
    return done * 2 * 2048 * width * inner / (time.perf_counter() - started)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for all steps together")
    parser.add_argument("--most", type=int, required=True)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    num_parameters = sum(f.stat().st_size for f in args.model.glob("*.safetensors")) / 2  # stored in bf16
    flops = matmul_flops(config["hidden_size"], config["intermediate_size"])
    step_s = 6 * num_parameters * TOKENS_A_STEP / (SHARE * flops)
    steps = max(LEAST, min(args.most, int(args.seconds / step_s)))
    print(steps)
    print(f"{flops / 1e9:.0f} GFLOP/s in bf16: about {step_s:.1f} s a step", end="")
    print(f", so {steps} steps instead of {args.most}" if steps < args.most else f", {steps} steps")


if __name__ == "__main__":
    run(main)
