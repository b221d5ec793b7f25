#!/usr/bin/env bash
# The job body: bash sbatch/lib.sh ALGO [--config FILE] [key=value ...]
#
#   begin     python3 -m strop.slurm begin: which run, is it free, the attempt's record
#   run_ranks srun (or the local launcher) starts one rank a GPU, maybe in a container
#   wait      a signal becomes a stop request; the ranks commit, record the outcome and exit 0
#   collect   where ranks log to their node's own disk: what those that were killed could not copy (and, before
#             the ranks start, what an attempt left there whose batch shell was killed, too)
#   end       python3 -m strop.slurm end: decides, requeues, sums up, gives the exit code
#
# What a site or a user may set (see configs/sites/example.env):
#   PYTHON         interpreter of the trainer; default .venv/bin/python of the repository, else python3
#   CONTAINER      image; started by Pyxis if srun knows it, else by Apptainer
#   MOUNTS         "/data:/data,/scratch:/scratch", added to the repository and the working directory
#   HOST_PYTHON    python3 >= 3.9 of the batch host, which takes the decisions (standard library only)
#   STROP_LAUNCHER=local STROP_LOCAL_RANKS=N   the same body without Slurm, on this machine
#   STROP_LOG_DIR  directory on every node's own disk: the ranks' logs are written there, and copied to the run
#   STROP_SUCCESSOR=1|0   submit a successor behind this job, or none; default: where it cannot be requeued
#   STROP_NOTIFY   command that gets the summary on its stdin when the job ends for good
set -euo pipefail

# shellcheck disable=SC2317 # reached through trap
on_signal() {
    signals+="$1 "
    if [[ $1 == INT && $signals == *INT*INT* && -n $ranks_pid ]]; then
        kill -HUP "$ranks_pid" 2>/dev/null || true # a second Ctrl-C: no more waiting for the commit
    else
        request_stop
    fi
    if [[ $1 == TERM && -n ${STROP_SUCCESSOR_JOB:-} ]]; then
        "$host_python" -m strop.slurm term & # scancel is for the successor too, before KILL comes
    fi
}

# A file, because a container may swallow the signal; the signal, because a file may be seen late.
request_stop() {
    [[ -n ${STROP_ATTEMPT:-} && -n $signals ]] || return 0
    local file
    file=$STROP_RUN_DIR/attempts/$(printf '%04d' "$STROP_ATTEMPT").stop
    [[ -e $file ]] || printf '%s\n' "${signals%% *}" >"$file"
    local program=bash
    if [[ -n $ranks_pid ]]; then read -r program <"/proc/$ranks_pid/comm" || true; fi 2>/dev/null
    # Before its exec run_ranks is a bash, which would die of the signal. The file is there in any case.
    if [[ $program != bash ]]; then kill -USR1 "$ranks_pid" 2>/dev/null || true; fi
}

# --kill-on-bad-exit and --wait: else the others wait for a dead rank until the time limit.
# --cpus-per-task: a step no longer inherits it from the job (Slurm 22.05), and would get one CPU.
run_ranks() {
    # INT: Ctrl-C goes to all processes of a terminal, and only the body acts on it. USR1 and TERM: until srun
    # (or the local launcher) watches for them, they would kill it. It does so with the signals blocked, and a
    # blocked signal waits although it is ignored.
    trap '' INT USR1 TERM
    if [[ ${STROP_LAUNCHER:-} == local ]]; then
        exec "$host_python" -m strop.slurm.local_launch --ranks "$STROP_TASKS_PER_NODE" -- "$@"
    fi
    local options=(--kill-on-bad-exit=1 --wait=30 --export=ALL
        "--nodes=$STROP_NUM_NODES" "--ntasks-per-node=$STROP_TASKS_PER_NODE"
        "--ntasks=$((STROP_NUM_NODES * STROP_TASKS_PER_NODE))")
    local cpus=$((${SLURM_CPUS_ON_NODE:-1} / STROP_TASKS_PER_NODE))
    if ((cpus > 0)); then options+=("--cpus-per-task=$cpus"); fi
    if ((STROP_GPUS_PER_NODE > 0)); then options+=("--gpus-per-node=$STROP_GPUS_PER_NODE"); fi
    local mounts=${STROP_RUN_DIR%/*}:${STROP_RUN_DIR%/*}${STROP_LOG_DIR:+,$STROP_LOG_DIR:$STROP_LOG_DIR}
    set_container "$STROP_GPUS_PER_NODE" "$mounts"
    forget_task_layout
    exec srun "${options[@]}" ${container_options[@]+"${container_options[@]}"} \
        ${container[@]+"${container[@]}"} "$PYTHON" -m strop.slurm.launch -- "$@"
}

# On every node, in a step of its own. A node that is gone must not hold up the decision; nor may what srun
# says of it be taken for what it said about the ranks (strop.slurm.deaths), hence the prefix.
collect_logs() {
    local limit=60
    if [[ -n $STROP_END_TIME ]] && (((STROP_END_TIME - $(date +%s)) / 4 < limit)); then
        limit=$(((STROP_END_TIME - $(date +%s)) / 4))
    fi
    local step=()
    if [[ ${STROP_LAUNCHER:-} != local ]]; then
        forget_task_layout
        step=(srun --overlap --export=ALL "--nodes=$STROP_NUM_NODES" --ntasks-per-node=1
            "--ntasks=$STROP_NUM_NODES" --cpus-per-task=1)
    fi
    timeout -k 5 $((limit > 5 ? limit : 5)) ${step[@]+"${step[@]}"} "$host_python" -m strop.slurm collect "$@" 2>&1 |
        sed -u 's/^/strop: logs: /' >&2
}

# One attempt; sets `action` and `exit_code`.
attempt() {
    local assignments
    ranks_pid=''
    assignments=$("$host_python" -m strop.slurm begin "$@") || exit $?
    eval "$assignments"
    if [[ -n $STROP_LEFT_LOGS ]]; then
        collect_logs earlier &
        wait_for $!
        if ((status != 0)); then say "logs of earlier attempts were left on the nodes, in $STROP_LOG_DIR"; fi
    fi
    run_ranks "$@" &
    ranks_pid=$!
    request_stop # a signal that came during `begin`, or before there was a process to tell
    wait_for "$ranks_pid"
    local launcher_exit=$status
    ranks_pid=''
    if [[ -n ${STROP_LOG_DIR:-} ]]; then
        collect_logs &
        wait_for $!
        if ((status != 0)); then say "logs were left on the nodes, in $STROP_LOG_DIR"; fi
    fi
    read -r action exit_code < <("$host_python" -m strop.slurm end --exit "$launcher_exit" --signals "$signals")
}

main() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # shellcheck source=sbatch/common.sh
    source "$root/sbatch/common.sh"
    (($# > 0)) || fail 'usage: bash sbatch/lib.sh ALGO [--config FILE] [key=value ...]'
    signals='' ranks_pid=''
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    trap 'on_signal INT' INT
    if [[ -z ${SLURM_JOB_ID:-} && ${STROP_LAUNCHER:-} != local ]]; then
        fail "not inside a Slurm job. Submit it: sbatch sbatch/$1.sh ...  Or run it on this machine: STROP_LAUNCHER=local STROP_LOCAL_RANKS=2 bash sbatch/lib.sh $1 ..."
    fi
    find_pythons
    find_container_tool
    export STROP_SHELL_PID=$$ STROP_LOCAL_RESTARTS=0
    attempt "$@"
    while [[ ${STROP_LAUNCHER:-} == local && $action == requeue ]]; do
        signals=''
        STROP_LOCAL_RESTARTS=$((STROP_LOCAL_RESTARTS + 1))
        attempt "$@" "run.name=${STROP_RUN_DIR##*/}" # a name that was made of the time
    done
    if [[ ${STROP_LAUNCHER:-} == local && $exit_code == 75 ]]; then
        local name=" run.name=${STROP_RUN_DIR##*/}"
        if [[ $* == *run.name=* ]]; then name=''; fi
        say "to go on: STROP_LAUNCHER=local STROP_LOCAL_RANKS=${STROP_TASKS_PER_NODE:-1} bash sbatch/lib.sh $("$host_python" -m strop.slurm show "$@")$name"
    fi
    exit "$exit_code"
}

# bash reads a script as it runs it: in a function it is read whole, and a `git pull` cannot change a job.
main "$@"
