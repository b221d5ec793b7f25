"""How the ranks find each other: no fixed port, and none computed from a job id, which may be taken.

Rank 0 binds port 0 and publishes `address:port` by rename in the attempt's directory. Every rank leaves a
mark there when it arrives; rank 0 waits for all marks, the others for the address. So a time-out can name
the ranks that never came, and a rank does not wait for one that has already left a verdict.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from pathlib import Path
from typing import Optional

from strop import files
from strop.slurm import attempts, stop

POLL_S = 0.05
SIOCGIFADDR = 0x8915


class Stopped(Exception):
    """A stop request came before all ranks had met. Nothing is lost: exit 0, the attempt yields."""


class PeerFailed(RuntimeError):
    """Another rank has left a verdict; this one only follows (verdict kind "peer")."""


def publish(run_dir: Path, attempt: int, address: str, port: int) -> None:
    """Rank 0 says where it listens."""
    files.write_json(_address_file(run_dir, attempt), {"address": address, "port": port})


def wait_for(
    run_dir: Path,
    attempt: int,
    rank: int,
    world_size: int,
    timeout_s: float,
    stop_request: Optional[stop.StopRequest] = None,
) -> tuple[str, int]:
    """The address and port of rank 0, once there is something to connect to.

    Rank 0 calls it after `publish` and gets its own address back when all `world_size` ranks have come.
    Raises TimeoutError naming the missing ranks, PeerFailed, or Stopped (give the trainer's own
    `stop_request`, since a signal is fetched only once).
    """
    logs = attempts.log_dir(run_dir, attempt)
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"present-{rank:05d}").touch()
    request = stop_request or stop.StopRequest(run_dir, attempt)
    deadline = time.monotonic() + timeout_s
    pause_s = POLL_S
    while True:
        published = files.read_json(_address_file(run_dir, attempt))
        missing = _missing(logs, world_size) if rank == 0 else []
        if published and not missing:
            return published["address"], published["port"]
        reason = request.poll()
        if reason:
            raise Stopped(reason)
        _raise_for_verdict(run_dir, attempt, rank)
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"rank {rank}: after {timeout_s:.0f} s " + _who_is_missing(_missing(logs, world_size))
            )
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.5)


def wait_for_file(run_dir: Path, attempt: int, rank: int, path: Path, stop_request: stop.StopRequest) -> None:
    """Until rank 0 has put `path` there, however long its work takes. Raises PeerFailed or Stopped."""
    while not path.exists():
        if reason := stop_request.poll():
            raise Stopped(reason)
        _raise_for_verdict(run_dir, attempt, rank)
        time.sleep(0.2)


def _address_file(run_dir: Path, attempt: int) -> Path:
    return attempts.log_dir(run_dir, attempt) / "rendezvous.json"


def _missing(logs: Path, world_size: int) -> list[int]:
    present = {name for name in os.listdir(logs) if name.startswith("present-")}
    return [rank for rank in range(world_size) if f"present-{rank:05d}" not in present]


def _who_is_missing(missing: list[int]) -> str:
    if not missing:
        return "all ranks have come, but rank 0 has published no address"
    shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    return f"{len(missing)} rank(s) have not come: {shown}"


def _raise_for_verdict(run_dir: Path, attempt: int, rank: int) -> None:
    """Rank 0 looks for anybody's verdict, the others for rank 0's: one file instead of a directory each."""
    if rank == 0:
        verdicts = attempts.read_verdicts(run_dir, attempt)
    else:
        verdict = files.read_json(attempts.log_dir(run_dir, attempt) / "verdict-00000.json")
        verdicts = [verdict] if verdict else []
    for verdict in verdicts:
        raise PeerFailed(f"rank {verdict['rank']} on {verdict['node']} has failed: {verdict['message']}")


def own_address(ifname: Optional[str] = None) -> str:
    """An address of this host that the other nodes reach.

    Of `ifname` where the site names one; else what the host's name stands for, unless that is a loopback
    address (Debian maps it to 127.0.1.1); else that of the interface with the default route; else that of
    any interface that is up. 127.0.0.1 only on a machine with no network at all.
    """
    if ifname:
        address = _interface_address(ifname)
        if address is None:
            raise OSError(f"STROP_IFNAME={ifname}: no such interface, or it has no IPv4 address")
        return address
    candidates = [_name_address(), _route_address()]
    candidates += [_interface_address(name) for _, name in socket.if_nameindex()]
    return next((a for a in candidates if a and not a.startswith("127.")), "127.0.0.1")


def interface_of(address: str) -> Optional[str]:
    """The interface that has this address: gloo wants a name, not an address."""
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if _interface_address(name) == address), None)


def _interface_address(name: str) -> Optional[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            packed = fcntl.ioctl(sock, SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
        except OSError:
            return None
    return socket.inet_ntoa(packed[20:24])


def _name_address() -> Optional[str]:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _route_address() -> Optional[str]:
    """Connecting a datagram socket sends nothing; it only asks the kernel for a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return sock.getsockname()[0]
