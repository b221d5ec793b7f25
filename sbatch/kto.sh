#!/usr/bin/env bash
# KTO: learn from answers that are called good or bad one by one.
#
#   sbatch sbatch/kto.sh                                  the demo: configs/kto.yaml
#   sbatch --nodes=2 sbatch/kto.sh --config my.yaml optim.lr=1e-6 run.name=first
#
# Options before the script's name are Slurm's and override the lines below; so do the SBATCH_* variables
# of a site file (source configs/sites/mysite.env). What follows the name is the trainer's.
# Submit it again with the same run.name, and the run goes on where it stands.

#SBATCH --job-name=kto
#SBATCH --nodes=1
# Whole nodes: all their CPUs and GPUs, one rank a GPU. For a part of a node take this line out, and say
# --gpus-per-node=N or --cpus-per-task=N.
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Five minutes before the end the batch shell gets USR1: the ranks commit a checkpoint, and the job goes
# back into the queue. It may come a minute early. Raise it where saving takes long.
#SBATCH --signal=B:USR1@300
# Slurm may restart the job (preemption, a lost node), and we ask it to.
#SBATCH --requeue
# Without append a restart would empty the file. %j tells the tasks of an array apart too. A folder in the
# name would have to exist: a job whose output cannot be opened fails without a word.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

# $0 is a copy in Slurm's spool directory. lib.sh lies in the repository: below the directory of submission,
# or beside the script that was submitted.
lib=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/sbatch/lib.sh
if [[ ! -f $lib ]]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)
    lib=$(dirname "$script")/lib.sh
fi
# exec: the signal goes to the batch shell alone, so lib.sh must be it.
exec bash "$lib" kto "$@"
