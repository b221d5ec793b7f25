#!/usr/bin/env bash
# A run's checkpoint as a Hugging Face directory, on one CPU node: what follows a run in a pipeline.
#
#   sbatch sbatch/convert.sh --run runs/first --step best
#   sbatch --dependency=afterok:JOBID --kill-on-invalid-dep=yes sbatch/convert.sh --run runs/first --finished
#
# Options before the script's name are Slurm's and override the lines below; what follows it goes to
# `python -m tools.convert_dcp_to_hf` (see its --help). It needs the memory of one shard of the model
# (--max-shard-size) and of the largest piece that one rank has stored.

#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=04:00:00
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
exec bash "$body" tools.convert_dcp_to_hf "$@"
