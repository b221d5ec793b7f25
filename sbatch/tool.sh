#!/usr/bin/env bash
# The body of a job that runs one tool on one node's CPUs: bash sbatch/tool.sh tools.NAME [ARGS]
#
#   run_tool  the tool as a child of this shell; in a step of its own where Pyxis brings the container
#   wait      a signal ends the tool; what it has finished it keeps
#   end       python3 -m strop.slurm end-tool: back into the queue if it was stopped, else its exit code
#
# Preempted, near its time limit or after a lost node the job goes on with the rest, under the same number, so
# what waits for it goes on waiting. PYTHON, CONTAINER, MOUNTS and HOST_PYTHON as in lib.sh.
set -euo pipefail

STOPPING_S=25 # of the 60 s between USR1 and the end of the job; a requeue takes its time, too

# shellcheck disable=SC2317 # reached through trap
on_signal() {
    signals+="$1 "
    stop_tool
}

# One that does not end must not keep the job from its requeue. Slurm ends what is left of a step. 124: the time
# is over; Slurm's own TERM ends the waiting, too.
stop_tool() {
    [[ -n $tool_pid ]] || return 0
    kill -TERM "$tool_pid" 2>/dev/null || true
    { timeout "$STOPPING_S" tail --pid="$tool_pid" -f /dev/null || (($? != 124)) || kill -KILL "$tool_pid"; } \
        2>/dev/null &
}

run_tool() {
    set_container "$("$host_python" -m strop.slurm gpus)"
    local step=()
    if [[ $container_tool == pyxis ]]; then
        step=(srun --ntasks=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}" "${container_options[@]}")
        forget_task_layout
    fi
    exec ${step[@]+"${step[@]}"} ${container[@]+"${container[@]}"} "$PYTHON" -m "$@"
}

main() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # shellcheck source=sbatch/common.sh
    source "$root/sbatch/common.sh"
    (($# > 0)) || fail 'usage: bash sbatch/tool.sh tools.NAME [ARGS]'
    signals='' tool_pid=''
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    find_pythons
    find_container_tool
    PYTHONPATH=$root:$PYTHONPATH # for `tools`, which is not installed
    run_tool "$@" &
    tool_pid=$!
    if [[ -n $signals ]]; then stop_tool; fi # one that came before there was a process to tell
    wait_for "$tool_pid"
    tool_pid=''
    exit "$("$host_python" -m strop.slurm end-tool --exit "$status" --signals "$signals")"
}

# bash reads a script as it runs it: in a function it is read whole, and a `git pull` cannot change a job.
main "$@"
