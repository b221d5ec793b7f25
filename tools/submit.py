"""Submit a job: the configuration is checked first, then submitit calls sbatch with the usual job body.

  python -m tools.submit --algo sft --nodes 2 --config my.yaml optim.lr=1e-5 run.name=first
  python -m tools.submit --algo dpo --dry-run                    print what sbatch would get
  python -m tools.submit --algo dpo --executor local --ntasks-per-node 2 --wait      without Slurm
  python -m tools.submit --algo dpo --partition gpu --time 08:00:00 --slurm mem=0 --slurm qos=high

Prints the job's id and the run's directory. With --wait it shows state and progress until the job has ended
for good, requeues included, and returns its exit code; Ctrl-C then ends the watching, not the job.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Optional

from strop.config import ALGOS
from strop.errors import UserError
from strop.submission import Job, submit
from tools.command_line import command_parser, run


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--algo", required=True, help=", ".join(ALGOS))
    parser.add_argument("--nodes", type=int, help="default: cluster.nodes of the configuration, else 1")
    parser.add_argument("--config", help="default: configs/<algo>.yaml")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--time", help="as sbatch's: [D-]HH:MM:SS or minutes")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--ntasks-per-node", type=int, help="ranks a node; default: one a GPU, else one")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION=VALUE", help="any other of sbatch's"
    )
    parser.add_argument("--name", help="the run's name: the same as run.name=NAME")
    parser.add_argument("--wait", action="store_true", help="until the job has ended; its exit code is ours")
    parser.add_argument("--dry-run", action="store_true", help="print the text for sbatch, submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def slurm_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("partition", "account", "time", "gpus_per_node", "ntasks_per_node")
    asked: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    for word in options.slurm:
        key, equals, value = word.lstrip("-").partition("=")
        asked[key.replace("-", "_")] = value if equals else True
    return asked


def main() -> None:
    options = parse()
    args = (["--config", options.config] if options.config else []) + options.overrides
    if options.name:
        if any(word.startswith("run.name=") for word in options.overrides):
            raise UserError("--name and run.name= are the same thing: give one of them")
        args.append(f"run.name={options.name}")
    job = submit(
        options.algo,
        args,
        nodes=options.nodes,
        executor=options.executor,
        dry_run=options.dry_run,
        **slurm_options(options),
    )
    if not isinstance(job, Job):
        print(job, end="")
        return
    print(f"job: {job.job_id}\nrun: {job.run_dir}\noutput: {job.output}", flush=True)
    if options.wait:
        exit_code = job.wait(lambda line: print(line, flush=True))
        if exit_code and job.output.exists():
            ours = [line for line in job.output.read_text().splitlines() if line.startswith("strop: ")]
            print("\n".join(ours[-6:]), file=sys.stderr)
        sys.exit(exit_code)


if __name__ == "__main__":
    run(main)
