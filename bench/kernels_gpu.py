"""The kernels on a GPU against the floors of this very card, and their peers: python -m bench.kernels_gpu

The ceilings come first, in the same run: TFLOP/s of torch's bf16 matmul of the very shape, GB/s of a copy on
the device. A floor is the operations or bytes that a method cannot do without, at those rates:

    log-probs only 2NHV   frozen head 4NHV   full gradient in one pass 6NHV, recomputed 8NHV
    logprob of logits: one read forward, one read and one write backward

The peers (Liger-Kernel, cut-cross-entropy, torch.compile, plain PyTorch) compute the same mean loss of the
same tensors, in an environment of their own that shares this one's torch; what cannot be installed is named.
Each time is the median of --repeats runs by CUDA events, after two that do not count. Memory is the most that
was allocated beyond what stood before. Without an NVIDIA GPU this ends with a message: no figure is made up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.results import write

ROOT = Path(__file__).resolve().parents[1]
PEERS = (f"liger-kernel=={peers.LIGER}", "cut-cross-entropy==25.1.1")
SHAPES = {"H4096 V128256": (8192, 4096, 128256), "H2048 V151936": (8192, 2048, 151936)}
"""Llama 3's and Qwen3's heads: N, H, V."""
ROW_SHAPE = (4096, 128256)
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One method on one shape."""

    method: str
    shape: str
    ms: Optional[float]
    """None where it failed; `note` says how."""
    floor_ms: float
    mib: float = 0.0
    note: str = ""

    @property
    def ratio(self) -> Optional[float]:
        return None if self.ms is None else self.ms / self.floor_ms


def require_gpu() -> None:
    """Exit 78 where there is none: what torch.cuda would raise later says less."""
    if not torch.cuda.is_available():
        print(
            "bench.kernels_gpu needs an NVIDIA GPU and a torch built for CUDA; none is here", file=sys.stderr
        )
        sys.exit(78)


def median_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for i in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak_mib(run: Callable[[], object]) -> float:
    """Beyond what is allocated before; the gradients that `run` leaves count, as for everybody."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure(method: str, shape: str, floor_ms: float, run: Callable[[], object], repeats: int) -> Figure:
    """A figure, or a note: a method may refuse a shape, need more memory than there is, or not run on this
    card. Whatever it is, the others' figures are not lost: time on such a machine is short."""
    try:
        run()  # what is compiled or set up at the first call is no memory that a method needs
        mib = peak_mib(run)
        return Figure(method, shape, median_ms(run, repeats), floor_ms, mib)
    except Exception as error:
        traceback.print_exc()
        said = (str(error).splitlines() or [""])[0]
        return Figure(method, shape, None, floor_ms, note=f"{type(error).__name__}: {said}")
    finally:
        torch.cuda.empty_cache()


# ---- Ceilings


def matmul_ms(num_tokens: int, hidden: int, vocab: int, repeats: int) -> float:
    """One matmul [N,H] x [H,V] in bf16, in pieces of the vocabulary that fit beside the rest: 2NHV."""
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(16384, hidden, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(num_tokens, 16384, device="cuda", dtype=torch.bfloat16)
    return median_ms(lambda: torch.mm(x, w.t(), out=out), repeats) * vocab / 16384


def copy_bytes_per_ms(repeats: int) -> float:
    """Bytes read and written by a copy of 1 GiB on the device."""
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * 2**30 / median_ms(lambda: target.copy_(source), repeats)


# ---- Ours


def inputs(num_tokens: int, hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
    w = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16, generator=generator) / hidden**0.5
    target = torch.randint(vocab, (num_tokens,), device="cuda", generator=generator)
    return x.requires_grad_(), w.requires_grad_(), target


def backward_of(loss: Tensor, *leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss.backward()


def our_head(name: str, shape: tuple[int, int, int], forward_ms: float, repeats: int) -> list[Figure]:
    from strop import ops
    from strop.ops import head

    x, w, target = inputs(*shape)
    frozen = w.detach()
    groups = list(range(0, shape[0] + 1, shape[0] // 8))

    def logp_only() -> None:
        with torch.no_grad():
            ops.linear_logprob(x, w, target)

    def frozen_head() -> None:
        backward_of(ops.linear_logprob(x, frozen, target)[0].mean(), x)

    def one_pass() -> None:
        loss, *_ = ops.linear_loss(x, w, target, lambda logp, rows: -logp.sum() / shape[0], groups)
        backward_of(loss, x, w)

    def recompute() -> None:
        kept, head.KEPT_BYTES = head.KEPT_BYTES, 0
        try:
            backward_of(-ops.linear_logprob(x, w, target)[0].mean(), x, w)
        finally:
            head.KEPT_BYTES = kept

    methods = ((1, logp_only), (2, frozen_head), (3, one_pass), (4, recompute))
    return [
        measure(f"strop {run.__name__}", name, times * forward_ms, run, repeats) for times, run in methods
    ]


def our_rows(bytes_per_ms: float, repeats: int) -> list[Figure]:
    """The row kernels alone, on logits that exist."""
    from strop import ops

    num_tokens, vocab = ROW_SHAPE
    logits = torch.randn(num_tokens, vocab, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(vocab, (num_tokens,), device="cuda")
    lse = torch.ops.strop.logprob(logits, target)[1]
    ones = torch.ones(num_tokens, device="cuda")
    read_ms, name = 2 * num_tokens * vocab / bytes_per_ms, f"N{num_tokens} V{vocab}"
    lengths = torch.arange(0, 65537, 512, device="cuda", dtype=torch.int32)
    tokens, ratio = torch.randn(65536, device="cuda"), torch.randn(64, 2, device="cuda")
    tiny_ms = 4 * 65536 / bytes_per_ms
    return [
        measure(
            "strop logprob forward", name, read_ms, lambda: torch.ops.strop.logprob(logits, target), repeats
        ),
        measure(
            "strop logprob backward",
            name,
            2 * read_ms,
            lambda: torch.ops.strop.logprob_backward(ones, logits, target, lse),
            repeats,
        ),
        measure(
            "strop segment_sum", "T65536 S128", tiny_ms, lambda: ops.segment_sum(tokens, lengths), repeats
        ),
        measure("strop dpo_loss", "P64", tiny_ms, lambda: ops.dpo_loss(ratio, "sigmoid", 0.1), repeats),
    ]


# ---- Peers: the same mean loss


def plain_loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.t()).float(), target)


def peer_losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """By name. A peer that cannot be imported raises when it is called, so it is noted as one that fails."""
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "plain bf16": plain_loss,
        "torch.compile": torch.compile(plain_loss, dynamic=False),
    }
    installed = {path.name.split("-")[0] for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info")}
    if "liger_kernel" in installed:
        losses["Liger-Kernel"] = liger_loss
    if "cut_cross_entropy" in installed:
        losses["cut-cross-entropy"] = cut_loss
    return losses


def liger_loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w, x, target)


def cut_loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, target)


def peer_figures(name: str, shape: tuple[int, int, int], forward_ms: float, repeats: int) -> list[Figure]:
    x, w, target = inputs(*shape)
    frozen = w.detach()
    figures = []
    for peer, loss in peer_losses().items():

        def forward(loss: Callable[[Tensor, Tensor, Tensor], Tensor] = loss) -> None:
            with torch.no_grad():
                loss(x, w, target)

        def frozen_head(loss: Callable[[Tensor, Tensor, Tensor], Tensor] = loss) -> None:
            backward_of(loss(x, frozen, target), x)

        def full(loss: Callable[[Tensor, Tensor, Tensor], Tensor] = loss) -> None:
            backward_of(loss(x, w, target), x, w)

        for what, times, run in (("forward", 1, forward), ("frozen", 2, frozen_head), ("full", 3, full)):
            figures.append(measure(f"{peer} {what}", name, times * forward_ms, run, repeats))
    return figures


def peers_python() -> tuple[Optional[Path], str]:
    """The interpreter of the peers' environment, or why there is none."""
    try:
        return peers.environment(peers.CACHE / "gpu", [], PEERS), ""
    except (OSError, subprocess.CalledProcessError):
        return None, f"{' and '.join(PEERS)} could not be installed"


def run_peers(forward_ms: dict[str, float], repeats: int) -> tuple[list[Figure], str]:
    """In their environment, as this module again."""
    python, why = peers_python()
    if python is None:
        return [], why
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peers.json"
        command = [str(python), "-m", "bench.kernels_gpu", "--repeats", str(repeats), "--json", str(path)]
        done = subprocess.run([*command, "--peers-only", json.dumps(forward_ms)], cwd=ROOT)
        if done.returncode:
            return [], f"the peers' process ended with {done.returncode}"
        return [Figure(**figure) for figure in json.loads(path.read_text())], ""


# ---- The report


def table(figures: list[Figure]) -> str:
    lines = [f"{'':28} {'shape':16} {'ms':>9} {'floor ms':>9} {'ratio':>6} {'MiB':>8}"]
    for f in figures:
        if f.ms is None:
            lines.append(f"{f.method:28} {f.shape:16} {f.note}")
        else:
            lines.append(
                f"{f.method:28} {f.shape:16} {f.ms:9.3f} {f.floor_ms:9.3f} {f.ratio:6.2f} {f.mib:8.0f}"
            )
    return "\n".join(lines)


def card(bytes_per_ms: float, forward_ms: dict[str, float]) -> dict[str, Any]:
    """Which card, when, and its ceilings."""
    rates = {}
    for name, ms in forward_ms.items():
        num_tokens, hidden, vocab = SHAPES[name]
        rates[name] = 2 * num_tokens * hidden * vocab / ms / 1e9
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "copy_tb_per_s": bytes_per_ms / 1e9,
        "matmul_tflop_per_s": rates,
    }


def keep(path: Optional[Path], head: dict[str, Any], figures: list[Figure], why: str) -> None:
    if path:
        rows = [{**asdict(f), "ratio": f.ratio} for f in figures]
        write(path, {**head, "figures": rows, "peers_missing": why})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of each (default 11)")
    parser.add_argument("--no-peers", action="store_true", help="strop's kernels alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peers-only", help=argparse.SUPPRESS)  # the peers' process: the floors, as JSON
    args = parser.parse_args()
    require_gpu()
    if args.peers_only:
        floors = json.loads(args.peers_only)
        figures = [
            f for name, ms in floors.items() for f in peer_figures(name, SHAPES[name], ms, args.repeats)
        ]
        args.json.write_text(json.dumps([asdict(f) for f in figures]))
        return
    bytes_per_ms = copy_bytes_per_ms(args.repeats)
    forward_ms = {name: matmul_ms(*shape, args.repeats) for name, shape in SHAPES.items()}
    head = card(bytes_per_ms, forward_ms)
    print(json.dumps(head, indent=1))
    figures = [
        f for name, shape in SHAPES.items() for f in our_head(name, shape, forward_ms[name], args.repeats)
    ]
    figures += our_rows(bytes_per_ms, args.repeats)
    torch.cuda.empty_cache()
    why = "not run"
    print(table(figures), flush=True)
    keep(args.json, head, figures, why)  # before the peers: they may take what is left of the machine's time
    if not args.no_peers:
        theirs, why = run_peers(forward_ms, args.repeats)
        print(table(theirs))
        keep(args.json, head, figures + theirs, why)
    if why:
        print(f"peers: {why}")


if __name__ == "__main__":
    main()
