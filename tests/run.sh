#!/usr/bin/env bash
# All tests, with what they need: virtual environment, Slurm, a cluster of their own.
#
#   bash tests/run.sh                    every group, one after the other
#   bash tests/run.sh -k rendezvous -x   one pytest run with these arguments
#
# PYTHON=... uses that interpreter as it is; otherwise .venv is made (tools/setup_env.sh).
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

work=$(mktemp -d /tmp/strop-tests.XXXXXX)
cluster=$work/cluster

take_down() {
    "$PYTHON" -m tools.local_slurm down --name tests --dir "$cluster" >/dev/null || true
    rm -rf "$work"
}

# run_group GROUP: its tests, its time; 5, "no tests collected", is no failure
run_group() {
    local start=$SECONDS status=0
    "$PYTHON" -m pytest "tests/$1" 2>&1 | tee "$work/$1.log" || status=$?
    echo "group $1: $((SECONDS - start)) s, pytest exit code $status"
    ((status == 0 || status == 5))
}

# closing_line SECONDS: the groups' counts summed up, as pytest writes them
closing_line() {
    tail -q -n 1 "$work"/*.log | grep -oE '[0-9]+ (passed|failed|errors?|skipped|deselected|xfailed|xpassed)' |
        sed 's/errors$/error/' |
        awk -v seconds="$1" '{ sum[$2] += $1 }
            END {
                split("failed passed skipped deselected xfailed xpassed error", order)
                for (i = 1; i in order; i++)
                    if (sum[order[i]]) text = text (text ? ", " : "") sum[order[i]] " " order[i]
                printf "==== %s in %d.00s ====\n", text ? text : "no tests ran", seconds
            }'
}

setup_venv
trap take_down EXIT
if ensure_slurm; then
    "$PYTHON" -m tools.local_slurm up --name tests --dir "$cluster" --nodes 2
    export STROP_TEST_CLUSTER=$cluster
    slurm_missing=0
else
    echo "without Slurm the tests in tests/slurm will fail" >&2
    slurm_missing=1
fi

if (($# > 0)); then
    status=0
    "$PYTHON" -m pytest "$@" || status=$?
    if ((status == 5)); then echo "no test is selected by: $*" >&2; fi
    exit "$status"
fi

failed=()
if ((slurm_missing)); then failed+=("Slurm not installed"); fi
start=$SECONDS
for group in unit dist slurm shim gpu; do
    if [[ -d tests/$group ]]; then run_group "$group" || failed+=("$group"); fi
done
if ((${#failed[@]})); then echo "failed: ${failed[*]}"; fi
closing_line $((SECONDS - start))
((${#failed[@]} == 0))
