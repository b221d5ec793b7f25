#!/usr/bin/env bash
# The body of a job that runs one tool on one node's CPUs: bash sbatch/tool.sh tools.NAME [ARGS]
#
# The tool keeps what it has finished. Stopped before its end (the time limit near, preemption) the job goes
# back into the queue, and goes on with the rest. PYTHON, CONTAINER and MOUNTS as in lib.sh.
set -euo pipefail

say() { printf 'strop: %s\n' "$*" >&2; }

# shellcheck disable=SC2317 # reached through trap
on_signal() {
    signals+="$1 "
    kill -TERM "$worker_pid" 2>/dev/null || true
}

set_command() {
    local python=${PYTHON:-python3}
    if [[ -z ${PYTHON:-} && -z ${CONTAINER:-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
    command=("$python" -m "$@")
    if [[ -z ${CONTAINER:-} ]]; then return; fi
    local mounts="$root:$root,$PWD:$PWD${MOUNTS:+,$MOUNTS}"
    if [[ $(srun --help 2>/dev/null) == *--container-image* ]]; then
        command=(srun --ntasks=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}" "--container-image=$CONTAINER"
            "--container-mounts=$mounts" "--container-workdir=$PWD" "${command[@]}")
    elif command -v apptainer >/dev/null; then
        command=(apptainer exec --bind "$mounts" --pwd "$PWD" "$CONTAINER" "${command[@]}")
    else
        say "CONTAINER=$CONTAINER: this cluster has neither Pyxis (srun --container-image) nor apptainer"
        exit 78
    fi
}

main() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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
