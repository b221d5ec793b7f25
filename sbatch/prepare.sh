#!/usr/bin/env bash
# Data preparation on one CPU node: text (or the rows of SFT and DPO) to token stores that jobs only map.
#
#   sbatch sbatch/prepare.sh                                        the demo: configs/cpt.yaml
#   sbatch --cpus-per-task=32 sbatch/prepare.sh --config my.yaml data.cache_dir=/scratch/stores
#   sbatch --dependency=singleton sbatch/prepare.sh --algo sft --config my.yaml
#
# Options before the script's name are Slurm's and override the lines below; what follows it goes to
# `python -m tools.prepare` (see its --help). Finished parts are kept: preempted, at the time limit, or after
# a lost node the job goes back into the queue and goes on with the rest. So does a second submission.

#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# A minute before the end the batch shell gets USR1, and puts the job back into the queue.
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

# The body lies in the repository: below the directory of submission, or beside the script that was submitted
# ($0 is a copy in Slurm's spool directory).
body=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/sbatch/tool.sh
if [[ ! -f $body ]]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)
    body=$(dirname "$script")/tool.sh
fi
# exec: the signal goes to the batch shell alone, so the body must be it.
exec bash "$body" tools.prepare "$@"
