#!/usr/bin/env bash
# From a fresh clone to an aligned model: bash tools/quickstart.sh [--tiny]
#
#   environment -> Slurm (its own small cluster if there is none) -> demo model and data -> a two-node job,
#   interrupted once on purpose and resumed -> Hugging Face directory -> what has changed -> curves
#
# Run again it uses what is there and trains a new run; a run that you have interrupted is resumed.
# --tiny takes a model of 3 million parameters in place of SmolLM2-135M-Instruct.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
info() { printf '   %s\n' "$*"; }

# What to say when something fails: set before each part.
advice=''
on_exit() {
    local code=$?
    if ((code == 0)); then return; fi
    printf '\nquickstart stopped (exit code %d).\n' "$code" >&2
    if [[ -n $advice ]]; then printf '%s\n' "$advice" >&2; fi
    printf 'Run it again to go on: bash tools/quickstart.sh %s\n' "$tiny" >&2
}

parse_arguments() {
    tiny=''
    case "$*" in
        '') ;;
        --tiny) tiny=--tiny ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) echo "usage: bash tools/quickstart.sh [--tiny]" >&2 && exit 64 ;;
    esac
    if [[ -n $tiny ]]; then
        model=assets/tiny base_name=quickstart-tiny most_steps=40 train_seconds=60
        options=("model.path=$model" optim.lr=2e-4 dpo.sft_loss_weight=1.0 validation.every=15 checkpoint.every=15)
    else
        model=assets/smollm2-135m-instruct base_name=quickstart most_steps=24 train_seconds=150
        # With the plain DPO loss alone, so few steps change preferences but hardly what is answered first.
        options=(optim.lr=1e-5 dpo.sft_loss_weight=1.0)
    fi
}

# Sets `launcher`: slurm where a cluster answers or one can be made here, else local.
find_cluster() {
    launcher=slurm
    if command -v sinfo >/dev/null && timeout 10 sinfo --noheader >/dev/null 2>&1; then
        info "using the Slurm that answers here: $(sinfo --version)"
    elif ensure_slurm; then
        advice='The local cluster did not start: see the messages above. State of its parts: python -m tools.local_slurm status'
        "$PYTHON" -m tools.local_slurm up | sed 's/^/   /'
        eval "$("$PYTHON" -m tools.local_slurm env)"
    else
        info 'no Slurm, and no right to install it: the same job runs through the local launcher, without Slurm'
        launcher=local
    fi
}

# Sets `name`: a run that stands half-way, else the next free one.
choose_run() {
    local number=1
    name=$base_name resuming=''
    while [[ -d runs/$name ]]; do
        if [[ ! -f runs/$name/quickstart.json ]] && [[ -n $(find "runs/$name/checkpoints" -name COMMITTED.json 2>/dev/null) ]]; then
            resuming=1
            steps=$(sed -n 's/^  max_steps: *//p' "runs/$name/config.yaml")
            return
        fi
        number=$((number + 1))
        name=$base_name-$number
    done
}

choose_steps() {
    if [[ -n $resuming ]]; then return; fi
    local answer
    answer=$("$PYTHON" -m tools.quickstart_scale --model "$model" --seconds "$train_seconds" --most "$most_steps")
    steps=${answer%%$'\n'*}
    info "${answer#*$'\n'}"
}

submit() {
    local words=("run.name=$name" "train.max_steps=$steps" ${options[@]+"${options[@]}"})
    if [[ $launcher == slurm ]]; then
        info "sbatch --nodes=2 sbatch/dpo.sh ${words[*]}"
        mkdir -p runs
        job=$(sbatch --parsable --nodes=2 --output=runs/%x-%j.out sbatch/dpo.sh "${words[@]}")
        job=${job%%;*}
        log=runs/dpo-$job.out
        job_option=(--job "$job")
        info "job $job, its output: $log"
    else
        info "STROP_LAUNCHER=local STROP_LOCAL_RANKS=2 bash sbatch/lib.sh dpo ${words[*]}"
        mkdir -p runs
        log=runs/$name.out
        STROP_LAUNCHER=local STROP_LOCAL_RANKS=2 bash sbatch/lib.sh dpo "${words[@]}" >"$log" 2>&1 &
        job=$!
        job_option=(--pid "$job")
    fi
    advice="The job's output is in $log, the run's logs are in runs/$name/logs."
}

watch_run() {
    if ! "$PYTHON" -m tools.quickstart_watch --run "runs/$name" --steps "$steps" "${job_option[@]}" "$@"; then
        echo "the last lines of $log:" >&2
        tail -n 15 "$log" | sed 's/^/  /' >&2
        return 1
    fi
}

train() {
    submit
    if [[ -z $resuming ]]; then
        watch_run --interrupt $((steps / 2))
    else
        info "runs/$name stands half-way and is resumed"
        watch_run
    fi
    info "runs/$name is finished; it took $(find "runs/$name/attempts" -name '????.json' | wc -l) attempts"
}

show_result() {
    local out=runs/$name/export
    advice="The trained checkpoints are in runs/$name/checkpoints."
    step 'Conversion to a Hugging Face directory'
    "$PYTHON" -m tools.convert_dcp_to_hf --run "runs/$name" --out "$out/final" --force 2>&1 | sed 's/^/   /'
    step 'What has changed, on questions that were not trained on'
    "$PYTHON" -m tools.quickstart_report --run "runs/$name" --base "$model" --after "$out/final" \
        --data assets/demo-dpo/validation.jsonl --json "runs/$name/quickstart.json"
    step 'Curves'
    info "$("$PYTHON" -m tools.plot "runs/$name")"
}

what_next() {
    step 'Done'
    cat <<EOF
   The aligned model: runs/$name/export/final   (any tool that reads Hugging Face directories)
   Try next:
     source .venv/bin/activate                                  # PYTHON here: $PYTHON
EOF
    if [[ $launcher == slurm && -n ${SLURM_CONF:-} ]]; then
        echo "     eval \"\$(python -m tools.local_slurm env)\"                # talk to the local cluster"
    fi
    cat <<EOF
     sbatch --nodes=2 sbatch/dpo.sh run.name=mine dpo.beta=0.3  # another run of the demo
     sbatch --nodes=2 sbatch/sft.sh                             # supervised fine-tuning
     python -m tools.plot runs/$name runs/mine       # compare the two
     python -m strop.train dpo --help                           # every setting
     python -m tools.local_slurm down                           # stop the local cluster
EOF
}

main() {
    parse_arguments "$@"
    trap on_exit EXIT
    step 'Environment'
    advice="The installation's log: \${STROP_VENV:-.venv}/setup.log"
    setup_venv
    step 'Slurm'
    find_cluster
    step 'Demo model and data'
    advice='Making the assets failed: python -m tools.demo_assets shows it alone.'
    # shellcheck disable=SC2086 # --tiny or nothing
    TQDM_DISABLE=1 "$PYTHON" -m tools.demo_assets $tiny 2>&1 | sed 's/^/   /'
    step 'Training: DPO on two nodes'
    choose_run
    choose_steps
    train
    show_result
    what_next
}

main "$@"
