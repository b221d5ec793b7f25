"""Which errors only say that another rank went away.

When one rank of 512 fails, up to 511 others report a closed connection or a time-out. Those reports say
nothing about the cause, and they may be written before the culprit's own words. So they are told by their
text: a sign that only torch.distributed writes, or a common network error whose message or last frame is
torch.distributed's. The same network error out of a data loader's own connection is that rank's failure.
"""

from __future__ import annotations

import re
from typing import Optional

NAMES = {
    "PeerFailed": "saw another rank's verdict",
    "Superseded": "superseded by a newer attempt",
    "RendezvousTimeoutError": "rendezvous: timed out",
    "RendezvousClosedError": "rendezvous: closed",
    "RendezvousConnectionError": "rendezvous: connection lost",
}
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|"
    r"CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc",
    re.IGNORECASE,
)
OWN = re.compile(
    r"unhandled cuda error|CUDA error|Cuda failure|internal error|invalid (usage|argument)|"
    r"illegal memory access|uncorrectable ECC|is only supported with|not (compiled|built) (in|with)",
    re.IGNORECASE,
)
"""A collective's error of which this rank's own device or call is the reason."""
SIGNS = (
    (
        r"Watchdog caught collective operation timeout|collective (operation )?time-?out",
        "NCCL: watchdog time-out",
    ),
    (r"NCCL.{0,200}remote process exited|ncclRemoteError", "NCCL: remote process exited"),
    (r"NCCL.{0,400}unhandled system error|ncclSystemError", "NCCL: system error"),
    (r"(NCCL|ProcessGroup|communicator).{0,200}\b(was )?aborted", "NCCL: communicator aborted"),
    (r"Some NCCL operations have failed or timed out", "NCCL: failed or timed out"),
    (r"dump signal (due to|from)", "NCCL: another rank gave the alarm"),
    (r"Timed out waiting \d+ ?ms for (recv|send|\w+) operation", "gloo: timed out"),
    (r"Application timeout caused pair closure", "gloo: timed out"),
    (r"failed to pass monitoredBarrier", "gloo: barrier timed out"),
    (r"Gloo connectFullMesh failed", "gloo: could not connect"),
    (r"rank\(s\) have not come", "rendezvous: ranks did not come"),
    (r"wait timeout after \d+ ?ms, keys", "TCPStore: timed out"),
    (
        r"Did the remote server shutdown or crash|client socket has (failed|timed out)",
        "TCPStore: rank 0 is gone",
    ),
)
"""(what only torch.distributed or our own rendezvous writes, the reason in short)."""
NETWORK = (
    (r"Connection closed by peer|Connection was likely closed", "connection closed by peer"),
    (r"Connection reset by peer", "connection reset by peer"),
    (r"Broken pipe", "connection broken"),
    (r"Connection refused|No route to host|Host is unreachable|Network is unreachable", "not reachable"),
    (r"Connection aborted|connection abort", "connection aborted"),
    (r"Socket Timeout|timed out|timeout", "timed out"),
)
"""What anybody's socket may say."""
DISTRIBUTED_ERRORS = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
DISTRIBUTED_WORDS = (
    ("NCCL", "NCCL"),
    ("gloo", "gloo"),
    ("TCPStore", "TCPStore"),
    ("c10d", "torch.distributed"),
)
DISTRIBUTED_FRAME = re.compile(r"/torch/distributed/|/strop/dist\.py$|/strop/slurm/rendezvous\.py$")


def reason(exception: Optional[str], message: str, traceback: Optional[str] = None) -> Optional[str]:
    """Why this error only follows another rank's end, in a few words; None if it stands for itself.

    `exception`: the type's name; `message`, `traceback`: its text.
    """
    if exception in NAMES:
        return NAMES[exception]
    if OUT_OF_MEMORY.search(message) or OWN.search(message):
        return None
    for sign, short in SIGNS:
        if re.search(sign, message, re.DOTALL):
            return short
    frames = re.findall(r'^ *File "([^"]+)", line \d+', traceback or "", re.MULTILINE)
    where = next((name for word, name in DISTRIBUTED_WORDS if word in message), None)
    if where is None and (
        exception in DISTRIBUTED_ERRORS or (frames and DISTRIBUTED_FRAME.search(frames[-1]))
    ):
        where = "torch.distributed"
    for sign, short in NETWORK if where else ():
        if re.search(sign, message, re.IGNORECASE):
            return f"{where}: {short}"
    return None


def is_out_of_memory(message: str) -> bool:
    """torch says it with a plain RuntimeError where the CPU's memory is gone."""
    return OUT_OF_MEMORY.search(message) is not None
