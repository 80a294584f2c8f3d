#!/usr/bin/env bash
# Fine-tunes GPT-2 with LoRA, generates from the test set, decodes and scores:
#
#   bash work.sh [e2e]    the experiment on E2E; needs its data and GPT-2's weights
#   bash work.sh webnlg   the same on WebNLG; scores of all, of seen and of unseen categories
#   bash work.sh dart     the same on DART
#   bash work.sh demo     a small experiment that makes its own data and base model; no download
#
# The flags are in data/experiment.ini and data/demo/. PRESET=paper takes the LoRA paper's settings
# (data/paper.ini) and the whole data. Variables override the flags, e.g. MODEL_CARD=gpt2.md EPOCHS=1
# bash work.sh; docs/reference.md explains them:
#
#   model     MODEL_CARD INIT_CHECKPOINT LORA_DIM LORA_ALPHA LORA_DROPOUT
#   folders   DATA WORK_DIR
#   training  EPOCHS BATCH_SIZE GRAD_ACC SEQ_LEN LEARNING_RATE WARMUP_STEPS WEIGHT_DECAY
#             LABEL_SMOOTH CORRECT_BIAS (yes, no) LOG_INTERVAL EVAL_INTERVAL SEED BASE_STEPS
#   search    BEAM_BATCH_SIZE BEAM_PRECISION (float32, bf16, int8) EVAL_LEN
#   the rest  PRESET PRECISION (float32, bf16) DEVICE (auto, cpu, cuda) RESUME (auto, yes, no)
#             NPROC MPI_FLAGS
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
flags=(@data/experiment.ini)  # the variables below override these
PRESET="${PRESET:-}"

case "$experiment" in
e2e | dart) raw="./data/$experiment" ;;
webnlg) raw=./data/webnlg_challenge_2017 ;;
demo)
    flags+=(@data/demo/demo.ini)
    MODEL_CARD=""  # the demo ignores the variable
    raw=./data/demo/work
    WORK_DIR="${WORK_DIR:-./trained_models/demo}"
    ;;
*) experiment="" ;;
esac
if [[ -z "$experiment" ]] || (( $# > 1 )); then
    echo "usage: bash work.sh [e2e|webnlg|dart|demo]" >&2
    exit 2
fi
case "$PRESET" in
"")
    DATA="${DATA:-$raw}"
    WORK_DIR="${WORK_DIR:-./trained_models/GPT2_M/$experiment}"
    ;;
paper)
    [[ "$experiment" != demo ]] || fail 2 "PRESET=paper: the demo has settings of its own"
    flags+=(@data/paper.ini)
    [[ "$experiment" != dart ]] || flags+=(@data/paper_dart.ini)
    DATA="${DATA:-$raw/whole}"
    WORK_DIR="${WORK_DIR:-./trained_models/paper/$experiment}"
    ;;
*) fail 2 "PRESET=$PRESET: must be paper, or not set" ;;
esac
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
    EVAL_INTERVAL BEAM_BATCH_SIZE BASE_STEPS SEQ_LEN EVAL_LEN
check 'yes|no' "yes or no" CORRECT_BIAS
check 'float32|bf16' "float32 or bf16" PRECISION
check 'float32|bf16|int8' "float32, bf16 or int8" BEAM_PRECISION
check '[0-9]{1,10}' "a whole number from 0 on" WARMUP_STEPS SEED LORA_DIM
check '[0-9]{1,10}(\.[0-9]+)?' "a number from 0 on" LORA_ALPHA
check '([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]{1,2})?' "a number such as 0.0002" \
    LEARNING_RATE WEIGHT_DECAY LORA_DROPOUT LABEL_SMOOTH
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

# The value that the last of the flag files to have this flag gives it, else DEFAULT.
flag() {  # NAME DEFAULT
    { echo "$2"; sed -n "s/^$1 *[=:] *\([^ ]\+\) *$/\1/p" "${flags[@]#@}"; } | tail -n 1
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
    local bias=()
    case "${CORRECT_BIAS:-}" in
    yes) bias=(--correct_bias) ;;
    no) bias=(--no-correct_bias) ;;
    esac
    EVAL_INTERVAL="${EVAL_INTERVAL:-$(short_epoch)}"
    override MODEL_CARD=model_card EPOCHS=max_epoch BATCH_SIZE=train_batch_size GRAD_ACC=grad_acc \
        LEARNING_RATE=lr WARMUP_STEPS=warmup_step LORA_DIM=lora_dim LORA_ALPHA=lora_alpha \
        LOG_INTERVAL=log_interval EVAL_INTERVAL=eval_interval SEED=random_seed SEQ_LEN=seq_len \
        WEIGHT_DECAY=weight_decay LORA_DROPOUT=lora_dropout LABEL_SMOOTH=label_smooth \
        PRECISION=precision
    launch src/gpt2_ft.py "${flags[@]}" "${overrides[@]}" "${bias[@]}" \
        --train_data "$DATA/train.jsonl" \
        --valid_data "$DATA/valid.jsonl" \
        --init_checkpoint "$1" \
        --work_dir "$WORK_DIR" \
        --resume "$RESUME" \
        --device "$DEVICE"
}

generate() {  # CHECKPOINT OUTPUT_FILE FLAG...
    override MODEL_CARD=model_card BEAM_BATCH_SIZE=batch_size LORA_DIM=lora_dim \
        LORA_ALPHA=lora_alpha SEQ_LEN=seq_len EVAL_LEN=eval_len \
        PRECISION=precision BEAM_PRECISION=precision  # the last one counts
    launch src/gpt2_beam.py "${flags[@]}" "${overrides[@]}" \
        --data "$DATA/test.jsonl" \
        --init_checkpoint "$1" \
        --work_dir "$WORK_DIR" \
        --output_file "$2" \
        --resume "$RESUME" \
        --device "$DEVICE" "${@:3}"
}

decode() {  # PREDICTIONS REFERENCES_OUT TEXT_OUT FLAG...
    python src/gpt2_decode.py \
        --vocab ./vocab \
        --sample_file "$1" \
        --input_file "$DATA/test_formatted.jsonl" \
        --output_ref_file "$2" \
        --output_pred_file "$3" "${@:4}"
}

# Runs a scoring COMMAND, and keeps what it prints, also if only METEOR failed; then `status`
# becomes its exit code.
score_to() {  # SCORES_OUT COMMAND...
    local code=0
    python "${@:2}" > "$1.part" || code=$?
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

decode_and_score_e2e() {  # PREDICTIONS
    local texts="${WORK_DIR%/}/"
    # The default folder has these names in the root; other folders keep theirs inside.
    [[ ! "$WORK_DIR" -ef ./trained_models/GPT2_M/e2e ]] || texts=""
    decode "$WORK_DIR/$1" "${texts}e2e_ref.txt" "${texts}e2e_pred.txt"
    if [[ ! -e "${texts}e2e_ref.txt" ]]; then
        echo "no references, so no scores; texts: ${texts}e2e_pred.txt"
        return
    fi
    score_to "$WORK_DIR/scores.txt" \
        eval/e2e/measure_scores.py "${texts}e2e_ref.txt" "${texts}e2e_pred.txt" -p
    cat "$WORK_DIR/scores.txt"
    python eval/record_scores.py "$WORK_DIR" "$DATA" "$1" scores.txt
    echo "texts: ${texts}e2e_ref.txt, ${texts}e2e_pred.txt; scores: $WORK_DIR/scores.txt"
}

# Whether the test set has inputs of the categories that --filter PART keeps.
has_inputs() {  # PART
    case "$1" in
    seen) grep -q '"cate": *true' "$DATA/test_formatted.jsonl" ;;
    unseen) grep -q '"cate": *false' "$DATA/test_formatted.jsonl" ;;
    esac
}

# WebNLG has scores of all inputs, and of those whose category the training set has or has not.
decode_and_score_triples() {  # PREDICTIONS
    local part name parts=(all) tables=() scores=()
    [[ "$experiment" != webnlg ]] || parts+=(seen unseen)
    for part in "${parts[@]}"; do
        if ! has_inputs "$part"; then
            echo "no test input of a category $part in training, so there are no scores of these"
            continue
        fi
        name="${part/#all/}"
        name="${name:+.$name}"
        decode "$WORK_DIR/$1" "$WORK_DIR/references$name" "$WORK_DIR/hypothesis$name" \
            --ref_type "$experiment" --ref_num 6 --tokenize --lower --filter "$part"
        if [[ ! -e "$WORK_DIR/references$name" ]]; then
            echo "no references, so no scores; texts: $WORK_DIR/hypothesis$name"
            if [[ "$part" == all ]]; then return; else continue; fi
        fi
        score_to "$WORK_DIR/scores$name.txt" eval/eval_m.py -who "$experiment, $part" \
            -R "$WORK_DIR/references$name/reference" -H "$WORK_DIR/hypothesis$name" -nr 6 \
            -m bleu,meteor,ter --json "$WORK_DIR/scores$name.json"
        tables+=("$WORK_DIR/scores$name.txt")
        scores+=("scores$name.json")
    done
    tail -n +1 "${tables[@]}"
    python eval/record_scores.py "$WORK_DIR" "$DATA" "$1" "${scores[@]}"
    echo "texts: $WORK_DIR/references*/, $WORK_DIR/hypothesis*; scores: $WORK_DIR/scores*.txt"
}

run_experiment() {
    local base checkpoint step predictions fetch file status=0
    MODEL_CARD="${MODEL_CARD:-$(flag model_card "")}"
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
    if [[ -n "${INIT_CHECKPOINT:-}" && ! -e "$base" ]]; then
        fail 1 "INIT_CHECKPOINT=$base: no such file or folder"
    fi
    need "$base" "bash download_pretrained_checkpoints.sh ${MODEL_CARD#gpt2.}"
    fetch="bash data/download_data.sh $experiment && bash create_datasets.sh $experiment"
    for file in train.jsonl valid.jsonl test.jsonl test_formatted.jsonl; do
        if [[ "$DATA" == "$raw/whole" && ! -f "$DATA/$file" ]]; then
            DATA_DIR="" FRACTION="" PRESET=paper bash create_datasets.sh "$experiment"
        fi
        need "$DATA/$file" "$fetch"
    done
    prepare

    fine_tune "$base"
    checkpoint="$(last_checkpoint "$WORK_DIR")"
    step="${checkpoint##*/model.}"
    step="${step%.pt}"
    predictions="predict.$step.b10p08r4.jsonl"
    generate "$checkpoint" "$predictions"
    if [[ "$experiment" == e2e ]]; then
        decode_and_score_e2e "$predictions"
    else
        decode_and_score_triples "$predictions"
    fi
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
    for name in base lora; do
        score_to "$WORK_DIR/${name}_scores.txt" \
            eval/e2e/measure_scores.py "$WORK_DIR/ref.txt" "$WORK_DIR/$name.txt" -p
    done
    python eval/record_scores.py "$WORK_DIR" "$DATA" lora.jsonl lora_scores.txt
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

case "$experiment" in
demo) run_demo ;;
*) run_experiment ;;
esac
