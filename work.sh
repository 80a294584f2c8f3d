#!/usr/bin/env bash
# Fine-tunes GPT-2 with LoRA, generates from the test set, decodes and scores:
#
#   bash work.sh          the E2E experiment; needs its data and GPT-2's weights
#   bash work.sh demo     a small experiment that makes its own data and base model; no download
#
# The flags are in data/e2e.ini and data/demo/. Variables override them, e.g. MODEL_CARD=gpt2.md EPOCHS=1
# bash work.sh; docs/reference.md explains them:
#
#   model     MODEL_CARD INIT_CHECKPOINT LORA_DIM LORA_ALPHA
#   folders   DATA WORK_DIR
#   training  EPOCHS BATCH_SIZE GRAD_ACC LEARNING_RATE WARMUP_STEPS LOG_INTERVAL EVAL_INTERVAL SEED
#             BASE_STEPS
#   the rest  BEAM_BATCH_SIZE DEVICE (auto, cpu, cuda) RESUME (auto, yes, no) NPROC MPI_FLAGS
#
# Training and beam search that broke off go on where they stopped, and are not repeated once they
# have ended; RESUME=no repeats them. Only one run at a time can use a work dir.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {  # EXIT_CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

experiment="${1:-e2e}"
flags=(@data/e2e.ini)  # the variables below override these

case "$experiment" in
e2e)
    DATA="${DATA:-./data/e2e}"
    WORK_DIR="${WORK_DIR:-./trained_models/GPT2_M/e2e}"
    ;;
demo)
    flags+=(@data/demo/demo.ini)
    MODEL_CARD=""  # the demo ignores the variable
    DATA="${DATA:-./data/demo/work}"
    WORK_DIR="${WORK_DIR:-./trained_models/demo}"
    ;;
*) experiment="" ;;
esac
if [[ -z "$experiment" ]] || (( $# > 1 )); then
    echo "usage: bash work.sh [e2e|demo]" >&2
    exit 2
fi
DEVICE="${DEVICE:-auto}"  # auto, cpu or cuda
RESUME="${RESUME:-auto}"  # auto, yes (an error if the settings differ) or no
export NPROC="${NPROC:-1}"  # processes for training and beam search, see setup.sh
MPI_FLAGS="${MPI_FLAGS:-}"  # further flags of mpirun, e.g. --hostfile FILE

# Now, because a wrong value would otherwise be found only after minutes or hours.
check() {  # PATTERN DESCRIPTION VARIABLE...
    local variable
    for variable in "${@:3}"; do
        [[ "${!variable:-}" =~ ^($1)?$ ]] || fail 2 "$variable=${!variable}: must be $2"
    done
}
check 'auto|cpu|cuda' "auto, cpu or cuda" DEVICE
check 'auto|yes|no' "auto, yes or no (see --resume of src/gpt2_ft.py)" RESUME
check 'gpt2\.(nano|sm|md|lg)|auto' "gpt2.nano, gpt2.sm, gpt2.md, gpt2.lg or auto" MODEL_CARD
check '[1-9][0-9]{0,8}' "a whole number from 1 on" NPROC EPOCHS BATCH_SIZE GRAD_ACC LOG_INTERVAL \
    EVAL_INTERVAL BEAM_BATCH_SIZE BASE_STEPS
check '[0-9]{1,10}' "a whole number from 0 on" WARMUP_STEPS SEED LORA_DIM
check '[0-9]{1,10}(\.[0-9]+)?' "a number from 0 on" LORA_ALPHA
check '([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]{1,2})?' "a number such as 0.0002" LEARNING_RATE
check '[^-@].*' "a path, with ./ before the first - or @" WORK_DIR DATA INIT_CHECKPOINT

# Sets the array `overrides` to the flags of those variables that are set.
override() {  # VARIABLE=FLAG...
    local pair variable
    overrides=()
    for pair in "$@"; do
        variable="${pair%%=*}"
        [[ -z "${!variable:-}" ]] || overrides+=("--${pair#*=}" "${!variable}")
    done
}

launch() {  # SCRIPT FLAG...
    if (( NPROC == 1 )); then
        python "$@"
        return
    fi
    # A machine that does not answer any more ends the run after 10 + 3 * 5 seconds.
    local mpi=(-np "$NPROC" --bind-to none --oversubscribe --mca oob_tcp_keepalive_time 10
        --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3)
    # A script that fails prints the reason; mpirun's own message is useful only with MPI_FLAGS.
    [[ -n "$MPI_FLAGS" ]] || mpi+=(--quiet)
    [[ "$(id -u)" != 0 ]] || mpi+=(--allow-run-as-root)
    # shellcheck disable=SC2086  # several flags
    mpirun "${mpi[@]}" $MPI_FLAGS python "$@"
}

need() {  # FILE_OR_FOLDER COMMAND_THAT_MAKES_IT
    if [[ ! -e "$1" ]]; then
        fail 1 "$1: no such file; run: $2 (bash work.sh demo needs no download)"
    fi
}

# A number above 0 that the last of the flag files to have this flag gives it, else DEFAULT.
flag() {  # NAME DEFAULT
    { echo "$2"; sed -n "s/^$1 *[=:] *\([1-9][0-9]*\) *$/\1/p" "${flags[@]#@}"; } | tail -n 1
}

# The steps of an epoch, if the flags would validate less often than that: a short run, too, gets a
# validation curve and model.best.pt. The defaults are those of src/gpt2_ft.py.
short_epoch() {
    local samples batch steps
    samples="$(grep -c '' "$DATA/train.jsonl" 2> /dev/null || true)"
    batch="${BATCH_SIZE:-$(flag train_batch_size 8)}"
    steps=$(( (${samples:-0} + batch - 1) / batch / NPROC ))
    (( steps == 0 || steps >= $(flag eval_interval 2000) )) || echo "$steps"
}

fine_tune() {  # BASE_CHECKPOINT
    EVAL_INTERVAL="${EVAL_INTERVAL:-$(short_epoch)}"
    override MODEL_CARD=model_card EPOCHS=max_epoch BATCH_SIZE=train_batch_size GRAD_ACC=grad_acc \
        LEARNING_RATE=lr WARMUP_STEPS=warmup_step LORA_DIM=lora_dim LORA_ALPHA=lora_alpha \
        LOG_INTERVAL=log_interval EVAL_INTERVAL=eval_interval SEED=random_seed
    launch src/gpt2_ft.py "${flags[@]}" "${overrides[@]}" \
        --train_data "$DATA/train.jsonl" \
        --valid_data "$DATA/valid.jsonl" \
        --init_checkpoint "$1" \
        --work_dir "$WORK_DIR" \
        --resume "$RESUME" \
        --device "$DEVICE"
}

generate() {  # CHECKPOINT OUTPUT_FILE FLAG...
    override MODEL_CARD=model_card BEAM_BATCH_SIZE=batch_size LORA_DIM=lora_dim \
        LORA_ALPHA=lora_alpha
    launch src/gpt2_beam.py "${flags[@]}" "${overrides[@]}" \
        --data "$DATA/test.jsonl" \
        --init_checkpoint "$1" \
        --work_dir "$WORK_DIR" \
        --output_file "$2" \
        --resume "$RESUME" \
        --device "$DEVICE" "${@:3}"
}

decode() {  # PREDICTIONS REFERENCES_OUT TEXT_OUT
    python src/gpt2_decode.py \
        --vocab ./vocab \
        --sample_file "$1" \
        --input_file "$DATA/test_formatted.jsonl" \
        --output_ref_file "$2" \
        --output_pred_file "$3"
}

# Scores that lack METEOR are kept, too; then `status` becomes the exit code of the scoring.
score_to() {  # SCORES_OUT REFERENCES TEXT
    local code=0
    python eval/e2e/measure_scores.py "$2" "$3" -p > "$1.part" || code=$?
    if (( code )) && [[ ! -s "$1.part" ]]; then
        rm "$1.part"
        exit "$code"
    fi
    mv "$1.part" "$1"
    (( code == 0 )) || status="$code"
}

# The checkpoint of the last training run, after its last step. The folder may also hold those of
# an earlier, longer run, and times do not tell them apart in a folder that was copied.
last_checkpoint() {  # FOLDER
    local step=""
    [[ ! -f "$1/metrics.csv" ]] || step="$(tail -n 1 "$1/metrics.csv" | cut -d , -f 1)"
    [[ -f "$1/model.$step.pt" ]] || step="$(find "$1/" -maxdepth 1 -name 'model.*.pt' |
        sed -n 's/.*\/model\.\([0-9]\+\)\.pt$/\1/p' | sort -n | tail -n 1)"
    echo "$1/model.$step.pt"
}

run_e2e() {
    local base checkpoint step predictions texts status=0
    MODEL_CARD="${MODEL_CARD:-$(sed -n 's/^model_card *= *//p' data/e2e.ini)}"
    case "$MODEL_CARD" in
    gpt2.sm) base=gpt2-pytorch_model.bin ;;
    gpt2.md) base=gpt2-medium-pytorch_model.bin ;;
    gpt2.lg) base=gpt2-large-pytorch_model.bin ;;
    *) base="" ;;
    esac
    base="${INIT_CHECKPOINT:-${base:+./pretrained_checkpoints/$base}}"
    if [[ -z "$base" ]]; then
        fail 1 "no published weights for MODEL_CARD=$MODEL_CARD; set INIT_CHECKPOINT"
    fi
    need "$DATA/train.jsonl" "bash data/download_data.sh && bash create_datasets.sh"
    need "$DATA/valid.jsonl" "bash data/download_data.sh && bash create_datasets.sh"
    need "$DATA/test.jsonl" "bash data/download_data.sh && bash create_datasets.sh"
    need "$base" "bash download_pretrained_checkpoints.sh ${MODEL_CARD#gpt2.}"
    prepare

    fine_tune "$base"
    checkpoint="$(last_checkpoint "$WORK_DIR")"
    step="${checkpoint##*/model.}"
    step="${step%.pt}"
    predictions="predict.$step.b10p08r4.jsonl"
    generate "$checkpoint" "$predictions"
    texts="${WORK_DIR%/}/"
    # The user's document has these names in the root, which belongs to the default folder alone.
    [[ ! "$WORK_DIR" -ef ./trained_models/GPT2_M/e2e ]] || texts=""
    decode "$WORK_DIR/$predictions" "${texts}e2e_ref.txt" "${texts}e2e_pred.txt"
    score_to "$WORK_DIR/scores.txt" "${texts}e2e_ref.txt" "${texts}e2e_pred.txt"
    cat "$WORK_DIR/scores.txt"
    python eval/e2e/record_scores.py "$WORK_DIR" "$DATA" scores.txt "$predictions"
    echo "texts: ${texts}e2e_ref.txt, ${texts}e2e_pred.txt; scores: $WORK_DIR/scores.txt"
    return "$status"
}

run_demo() {
    local base name status=0
    prepare
    setup_lock "$DATA" data "wait until it ends, or set WORK_DIR and DATA to other folders"
    echo "== a corpus in E2E's format, and a broader one to pretrain on"
    python data/demo/generate.py "$DATA"
    for name in base_train base_valid train valid test; do
        python src/gpt2_encode.py --vocab ./vocab --input "$DATA/${name}_formatted.jsonl" \
            --output "$DATA/$name.jsonl" --add_bos --add_eos
    done

    echo "== a gpt2.nano base model, pretrained on the broader corpus"
    pretrain
    base="$(last_checkpoint "$WORK_DIR/base")"
    echo "== LoRA on the frozen base"
    fine_tune "$base"

    echo "== beam search, decoding and scores, of the base alone and with LoRA"
    generate "$base" base.jsonl --lora_dim 0
    generate "$(last_checkpoint "$WORK_DIR")" lora.jsonl
    decode "$WORK_DIR/base.jsonl" "$WORK_DIR/ref.txt" "$WORK_DIR/base.txt"
    decode "$WORK_DIR/lora.jsonl" "$WORK_DIR/ref.txt" "$WORK_DIR/lora.txt"
    score_to "$WORK_DIR/base_scores.txt" "$WORK_DIR/ref.txt" "$WORK_DIR/base.txt"
    score_to "$WORK_DIR/lora_scores.txt" "$WORK_DIR/ref.txt" "$WORK_DIR/lora.txt"
    python eval/e2e/record_scores.py "$WORK_DIR" "$DATA" lora_scores.txt lora.jsonl
    python data/demo/report.py "$DATA/test_formatted.jsonl" "$WORK_DIR"
    return "$status"
}

pretrain() {
    override BASE_STEPS=max_step SEED=random_seed
    launch src/gpt2_ft.py @data/demo/base.ini "${overrides[@]}" \
        --train_data "$DATA/base_train.jsonl" \
        --valid_data "$DATA/base_valid.jsonl" \
        --work_dir "$WORK_DIR/base" \
        --resume "$RESUME" \
        --device "$DEVICE"
}

prepare() {
    mkdir -p "$WORK_DIR" 2> /dev/null ||
        fail 1 "$WORK_DIR: cannot be made; set WORK_DIR to another folder"
    source ./setup.sh
    setup_lock "$WORK_DIR" work "wait until it ends, or set WORK_DIR to another folder"
    python vocab/download_vocab.py vocab
}

"run_$experiment"
