"""Ranks of the real trainer under srun, at no cost of imports: sixteen of them would take minutes.

`python -m tests.slurm.forked SOCKET` has torch loaded and forks a child for everyone who asks. Run as a
script this is the one who asks: srun's task. It hands over its arguments, environment, directory and open
files, waits, and ends as the child has ended, by the same signal; if srun kills it, the child dies too. So
Slurm sees what it would see of a rank. `+metadata.fault=KIND:RANK:STEP` makes a rank fail (`strike`).
"""

from __future__ import annotations

import array
import faulthandler
import json
import os
import signal
import socket
import sys

VARIABLE = "STROP_TEST_FORK_SERVER"


def ask(argv: list[str]) -> None:
    """srun's task. Standard library only, and little of it."""
    fds = [0, 1, 2]
    fds += [int(os.environ[name]) for name in ("STROP_STDOUT_FD", "STROP_RAW_FD") if os.environ.get(name)]
    request = {"argv": argv, "env": dict(os.environ), "cwd": os.getcwd(), "fds": fds}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[VARIABLE])
        text = json.dumps(request).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        server.sendmsg([len(text).to_bytes(8, "little")], rights)
        server.sendall(text)
        answer = server.makefile().readline()
    code = int(answer or 1)  # no answer: the server is gone
    if code < 0:
        faulthandler.disable()  # the child's stacks are the rank's
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    sys.exit(code)


# ----------------------------------------------------------------------------------------- the server


def serve(path: str) -> None:
    import threading

    import strop.loop  # noqa: F401  torch and transformers, once

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        size, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(4 * 8))
        fds = array.array("i", b"".join(data for _, _, data in rights))
        left, parts = int.from_bytes(size, "little"), []
        while left:
            parts.append(connection.recv(left))
            left -= len(parts[-1])
        request = json.loads(b"".join(parts))
        pid = os.fork()
        if pid == 0:
            listener.close()
            become(request, list(fds), connection)
        for fd in fds:
            os.close(fd)
        threading.Thread(target=tell, args=(pid, connection), daemon=True).start()


def tell(pid: int, connection: socket.socket) -> None:
    """How the child ended, to the task that it stands for."""
    import contextlib

    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # the task was killed itself
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    connection.close()


def become(request: dict, fds: list[int], connection: socket.socket) -> None:
    """A child: the rank that was asked for."""
    import fcntl
    import threading
    import traceback

    code = 1
    try:
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]  # out of the way of the numbers wanted
        connection = socket.socket(fileno=fcntl.fcntl(connection.detach(), fcntl.F_DUPFD_CLOEXEC, 100))
        for fd, number in zip(fds, request["fds"]):
            os.dup2(fd, number)
            os.close(fd)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
        threading.Thread(target=die_with, args=(connection,), daemon=True).start()
        fault = next((w.split("=")[1] for w in request["argv"] if w.startswith("+metadata.fault=")), None)
        if fault:
            inject(*fault.split(":"))
        from strop import train

        code = train.main(request["argv"])
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def die_with(connection: socket.socket) -> None:
    connection.recv(1)  # nothing is ever sent: the task has died
    os.kill(os.getpid(), signal.SIGKILL)


def inject(kind: str, rank: str, step: str) -> None:
    """The rank fails in the forward pass of this step."""
    from strop import loop

    forward = loop._forward

    def faulty(t, batch, *rest):
        if t.dist.rank == int(rank) and t.state.step == int(step):
            strike(kind)
        return forward(t, batch, *rest)

    loop._forward = faulty


def strike(kind: str) -> None:
    import resource
    import time
    from pathlib import Path

    import torch

    if kind == "raise":
        raise KeyError("this row has no chosen side")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(3600)
    if kind == "memory":
        used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        torch.ones(1 << 30)


if __name__ == "__main__":
    if __package__:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1:])
