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

say() { printf 'strop: %s\n' "$*" >&2; }

# shellcheck disable=SC2317 # reached through trap
on_signal() {
    signals+="$1 "
    kill -TERM "$worker_pid" 2>/dev/null || true
}

# The repository: below the directory of submission, or where the script that was submitted lies.
find_root() {
    root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
    if [[ ! -f $root/tools/prepare.py ]]; then
        local script
        script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)
        root=$(cd "$(dirname "$script")/.." && pwd)
    fi
}

# PYTHON, CONTAINER and MOUNTS as in lib.sh.
set_command() {
    local python=${PYTHON:-python3}
    if [[ -z ${PYTHON:-} && -z ${CONTAINER:-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
    command=("$python" -m tools.prepare "$@")
    if [[ -z ${CONTAINER:-} ]]; then return; fi
    local mounts="$root:$root,$PWD:$PWD${MOUNTS:+,$MOUNTS}"
    if [[ $(srun --help 2>/dev/null) == *--container-image* ]]; then
        command=(srun --ntasks=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}" "--container-image=$CONTAINER"
            "--container-mounts=$mounts" "--container-workdir=$PWD" "${command[@]}")
    else
        command=(apptainer exec --bind "$mounts" --pwd "$PWD" "$CONTAINER" "${command[@]}")
    fi
}

main() {
    find_root
    set_command "$@"
    export PYTHONPATH=$root/src:$root${PYTHONPATH:+:$PYTHONPATH}
    signals='' worker_pid=''
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    local exit_code=0
    "${command[@]}" &
    worker_pid=$!
    while kill -0 "$worker_pid" 2>/dev/null; do # a trap ends a wait: see wait_for in lib.sh
        exit_code=0
        wait "$worker_pid" || exit_code=$?
    done
    local last=0
    wait "$worker_pid" 2>/dev/null || last=$?
    if ((last != 127)); then exit_code=$last; fi
    # Preemption sends TERM to the steps (a container's srun), and not to this shell; scancel to both.
    if [[ $exit_code != 0 && ($signals == "USR1 " || ($exit_code == 143 && -z $signals)) ]]; then
        say "stopped before the end; what is finished is kept: back into the queue"
        scontrol requeue "$SLURM_JOB_ID" || exit 75
    fi
    exit "$exit_code"
}

main "$@"
