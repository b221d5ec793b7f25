# shellcheck shell=bash disable=SC2034,SC2154 # set here and read by the body; `root` the other way round
# What both job bodies do (lib.sh for a run, tool.sh for a tool): the interpreters, the container around the
# command, waiting for it through signals. Sourced; `root`, the repository, is set before.

say() { printf 'strop: %s\n' "$*" >&2; }

fail() {
    say "$1"
    exit 78 # the user's error: see src/strop/errors.py
}

# Sets `host_python`, and PYTHON and PYTHONPATH for the command.
find_pythons() {
    host_python=${HOST_PYTHON:-python3}
    "$host_python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        fail "HOST_PYTHON=$host_python: python3 3.9 or newer is needed on the batch host"
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        if [[ -z ${CONTAINER:-} && -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
    elif [[ -z ${CONTAINER:-} ]] && ! command -v "$PYTHON" >/dev/null; then
        fail "PYTHON=$PYTHON: no such program on $(hostname)"
    fi
    export PYTHON
    if [[ :${PYTHONPATH:-}: != *":$root/src:"* ]]; then # a successor has it from this job
        export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
    fi
}

# Sets `container_tool`. Before anything begins: a missing one is the user's or the site's error.
find_container_tool() {
    container_tool=none
    [[ -n ${CONTAINER:-} ]] || return 0
    if [[ $(srun --help 2>/dev/null) == *--container-image* ]]; then
        container_tool=pyxis
    elif command -v apptainer >/dev/null; then
        container_tool=apptainer
    else
        fail "CONTAINER=$CONTAINER: this cluster has neither Pyxis (srun --container-image) nor apptainer"
    fi
}

# set_container GPUS_OF_THE_NODE [SRC:DST,...]: sets the arrays `container_options`, for srun, and `container`,
# what stands between srun and python. Mounted are the repository, the working directory, these, and MOUNTS.
set_container() {
    container_options=() container=()
    local mounts="$root:$root,$PWD:$PWD${2:+,$2}${MOUNTS:+,$MOUNTS}"
    if [[ $container_tool == pyxis ]]; then
        container_options=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    elif [[ $container_tool == apptainer ]]; then
        container=(apptainer exec --bind "$mounts" --pwd "$PWD")
        if (($1 > 0)); then container+=(--nv); fi
        container+=("$CONTAINER")
    fi
}

# Before an srun that says these itself: the job's own settings would contradict it.
forget_task_layout() {
    unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_CPUS_PER_TASK
}

# bash runs a trap only between commands: what it waits for must be a background process and `wait`. A `wait`
# returns as soon as a trap has run; the process is still there then. The last one has its code, unless it
# ended while a trap ran: it is asked once more (127: it has been given already). Sets `status`.
wait_for() {
    status=0
    while kill -0 "$1" 2>/dev/null; do
        status=0
        wait "$1" || status=$?
    done
    local last=0
    wait "$1" 2>/dev/null || last=$?
    if ((last != 127)); then status=$last; fi
}
