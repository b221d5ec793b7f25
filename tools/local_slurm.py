"""A real Slurm cluster on this machine: real daemons, real queue, no hardware needed.

  python -m tools.local_slurm up                     start it (two nodes), or repair it; nothing to do is fine
  eval "$(python -m tools.local_slurm env)"          let sbatch, squeue, ... of this shell talk to it
  sbatch --nodes=2 sbatch/dpo.sh                     a job
  sbatch --partition=high ...                        a job that preempts those of partition low (the default)
  python -m tools.local_slurm status                 daemons, nodes, jobs; exit code 0 if healthy
  python -m tools.local_slurm down                   end all of it, running jobs too, and remove its directory

The cluster belongs to the user who starts it (root or not) and runs that user's jobs. Needs Debian's or
Ubuntu's packages slurm-wlm and munge. Give --name for a second cluster beside the first.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from strop.slurm.local_cluster import ClusterError, LocalCluster
from tools.command_line import run


def positive(text: str) -> int:
    number = int(text)
    if not 0 < number <= 64:
        raise argparse.ArgumentTypeError(f"{number}: from 1 to 64, please")
    return number


def not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: 0 or more, please")
    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="default", help="the cluster's name (default: %(default)s)")
    common.add_argument("--dir", help="its directory (default: ~/.cache/strop/slurm/NAME)")
    parser = argparse.ArgumentParser(
        prog="python -m tools.local_slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", parents=[common], help="start the cluster, or what is missing of it")
    up.add_argument("--nodes", type=positive, help="number of nodes (default: as it is; 2 for a new cluster)")
    up.add_argument(
        "--gpus-per-node", type=not_negative, help="GPUs to declare, without hardware (default: 0)"
    )
    commands.add_parser("status", parents=[common], help="daemons, nodes and jobs")
    commands.add_parser("env", parents=[common], help='shell commands for eval "$(...)"')
    commands.add_parser("down", parents=[common], help="end everything and remove the directory")
    return parser.parse_args(argv)


def up(cluster: LocalCluster, args: argparse.Namespace) -> int:
    started = cluster.up(args.nodes, args.gpus_per_node, say=lambda line: print(line, flush=True))
    spec = cluster.spec()
    assert spec is not None
    gpus = f" with {spec.gpus_per_node} GPUs each" if spec.gpus_per_node else ""
    state = "is up" if started else "was up already"
    print(
        f"local Slurm {cluster.name!r} {state}: {spec.num_nodes} nodes{gpus}, "
        f"partitions low (default) and high, in {cluster.directory}"
    )
    return 0


def status(cluster: LocalCluster) -> int:
    if cluster.spec() is None:
        print(f"no local Slurm in {cluster.directory}: start it with `python -m tools.local_slurm up`")
        return 1
    for name, pid in cluster.daemons().items():
        print(f"{name:10} pid {pid}")
    problems = cluster.problems()
    if problems:
        print("\n".join(problems))
        print("`python -m tools.local_slurm up` repairs it")
        return 1
    print("\n".join(f"{node:10} {state}" for node, state in cluster.node_states().items()))
    print(cluster.slurm("squeue", "--states=all").rstrip())
    print(f"configuration {cluster.conf}, logs {cluster.directory / 'log'}")
    return 0


def env(cluster: LocalCluster) -> int:
    if cluster.spec() is None:
        raise ClusterError(
            f"no local Slurm in {cluster.directory}: start it with `python -m tools.local_slurm up`"
        )
    print("\n".join(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment().items()))
    return 0


def down(cluster: LocalCluster) -> int:
    num_ended = cluster.down()
    if num_ended is None:
        print(f"no local Slurm in {cluster.directory}: nothing to do")
    else:
        print(
            f"local Slurm {cluster.name!r} is down: {num_ended} processes ended, {cluster.directory} removed"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        cluster = LocalCluster(args.name, args.dir)
        if args.command == "up":
            return up(cluster, args)
        return {"status": status, "env": env, "down": down}[args.command](cluster)
    except ClusterError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
