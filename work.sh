#!/usr/bin/env bash
# Fine-tunes GPT-2 with LoRA, generates from the test set, decodes and scores:
#
#   bash work.sh          the E2E experiment; needs its data and GPT-2's weights
#   bash work.sh demo     the same in small on data and a base model made here; needs no download
#
# Every variable below can be set in the environment, e.g. MODEL_CARD=gpt2.md bash work.sh.
# A training run that broke off is continued where it stopped; RESUME=no begins it anew.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case "${1:-e2e}" in
e2e)
    MODEL_CARD="${MODEL_CARD:-gpt2.sm}"
    DATA="${DATA:-./data/e2e}"
    WORK_DIR="${WORK_DIR:-./trained_models/GPT2_M/e2e}"
    EPOCHS="${EPOCHS:-5}"
    BATCH_SIZE="${BATCH_SIZE:-2}"
    GRAD_ACC="${GRAD_ACC:-2}"
    LEARNING_RATE="${LEARNING_RATE:-0.0002}"
    WARMUP_STEPS="${WARMUP_STEPS:-500}"
    BEAM_BATCH_SIZE="${BEAM_BATCH_SIZE:-1}"
    ;;
demo)
    MODEL_CARD=gpt2.nano
    DATA="${DATA:-./data/demo/work}"
    WORK_DIR="${WORK_DIR:-./trained_models/demo}"
    BASE_STEPS="${BASE_STEPS:-900}"
    EPOCHS="${EPOCHS:-1}"
    BATCH_SIZE="${BATCH_SIZE:-8}"
    GRAD_ACC="${GRAD_ACC:-1}"
    LEARNING_RATE="${LEARNING_RATE:-0.001}"
    WARMUP_STEPS="${WARMUP_STEPS:-50}"
    BEAM_BATCH_SIZE="${BEAM_BATCH_SIZE:-16}"
    ;;
*)
    echo "usage: bash work.sh [e2e|demo]" >&2
    exit 2
    ;;
esac
DEVICE="${DEVICE:-auto}"  # auto, cpu or cuda
SEED="${SEED:-2025}"
LOG_INTERVAL="${LOG_INTERVAL:-100}"
LORA_DIM="${LORA_DIM:-4}"
LORA_ALPHA="${LORA_ALPHA:-32}"
RESUME="${RESUME:-auto}"  # auto, yes (refuse a run of other settings) or no
export NPROC="${NPROC:-1}"  # processes that share training and beam search, see setup.sh
MPI_FLAGS="${MPI_FLAGS:-}"  # more flags of mpirun, e.g. --hostfile FILE

launch() {  # SCRIPT FLAG...
    if (( NPROC == 1 )); then
        python "$@"
        return
    fi
    local flags=(-np "$NPROC" --bind-to none --oversubscribe)
    # A script that fails says why; what mpirun says about that is of use with flags of one's own.
    [[ -n "$MPI_FLAGS" ]] || flags+=(--quiet)
    [[ "$(id -u)" != 0 ]] || flags+=(--allow-run-as-root)
    # shellcheck disable=SC2086  # several flags
    mpirun "${flags[@]}" $MPI_FLAGS python "$@"
}

need() {  # FILE COMMAND_THAT_MAKES_IT
    if [[ ! -f "$1" ]]; then
        echo "error: $1: no such file; run: $2 (bash work.sh demo needs no download)" >&2
        exit 1
    fi
}

fine_tune() {  # BASE_CHECKPOINT
    launch src/gpt2_ft.py \
        --train_data "$DATA/train.jsonl" \
        --valid_data "$DATA/valid.jsonl" \
        --train_batch_size "$BATCH_SIZE" \
        --grad_acc "$GRAD_ACC" \
        --valid_batch_size 1 \
        --seq_len 64 \
        --model_card "$MODEL_CARD" \
        --init_checkpoint "$1" \
        --clip 0.0 \
        --lr "$LEARNING_RATE" \
        --weight_decay 0.01 \
        --adam_beta2 0.999 \
        --scheduler linear \
        --warmup_step "$WARMUP_STEPS" \
        --max_epoch "$EPOCHS" \
        --save_interval 1000 \
        --lora_dim "$LORA_DIM" \
        --lora_alpha "$LORA_ALPHA" \
        --lora_dropout 0.1 \
        --label_smooth 0.1 \
        --log_interval "$LOG_INTERVAL" \
        --work_dir "$WORK_DIR" \
        --random_seed "$SEED" \
        --resume "$RESUME" \
        --device "$DEVICE"
}

generate() {  # CHECKPOINT LORA_DIM OUTPUT_FILE
    launch src/gpt2_beam.py \
        --data "$DATA/test.jsonl" \
        --batch_size "$BEAM_BATCH_SIZE" \
        --seq_len 64 \
        --eval_len 32 \
        --model_card "$MODEL_CARD" \
        --init_checkpoint "$1" \
        --lora_dim "$2" \
        --lora_alpha "$LORA_ALPHA" \
        --beam 10 \
        --length_penalty 0.8 \
        --no_repeat_ngram_size 4 \
        --repetition_penalty 1.0 \
        --eos_token_id 628 \
        --work_dir "$WORK_DIR" \
        --output_file "$3" \
        --device "$DEVICE"
}

decode() {  # PREDICTIONS REFERENCES_OUT TEXT_OUT
    python src/gpt2_decode.py \
        --vocab ./vocab \
        --sample_file "$1" \
        --input_file "$DATA/test_formatted.jsonl" \
        --output_ref_file "$2" \
        --output_pred_file "$3"
}

score() {  # REFERENCES TEXT
    python eval/e2e/measure_scores.py "$1" "$2" -p
}

score_to() {  # SCORES_OUT REFERENCES TEXT
    score "$2" "$3" > "$1.part"
    mv "$1.part" "$1"
}

# The checkpoint that training wrote last: its step depends on the data and the epochs.
last_checkpoint() {  # FOLDER
    find "$1" -maxdepth 1 -name 'model.[0-9]*.pt' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2-
}

run_e2e() {
    local base checkpoint step predictions
    case "$MODEL_CARD" in
    gpt2.sm) base=gpt2-pytorch_model.bin ;;
    gpt2.md) base=gpt2-medium-pytorch_model.bin ;;
    gpt2.lg) base=gpt2-large-pytorch_model.bin ;;
    *) base="" ;;
    esac
    base="${INIT_CHECKPOINT:-${base:+./pretrained_checkpoints/$base}}"
    if [[ -z "$base" ]]; then
        echo "error: no published weights for MODEL_CARD=$MODEL_CARD; set INIT_CHECKPOINT" >&2
        exit 1
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
    generate "$checkpoint" "$LORA_DIM" "$predictions"
    decode "$WORK_DIR/$predictions" e2e_ref.txt e2e_pred.txt
    score e2e_ref.txt e2e_pred.txt
}

run_demo() {
    local base name
    prepare
    echo "== a corpus in E2E's format, and a broader one to pretrain on"
    python data/demo/generate.py "$DATA"
    for name in base_train base_valid train valid test; do
        python src/gpt2_encode.py --vocab ./vocab --input "$DATA/${name}_formatted.jsonl" \
            --output "$DATA/$name.jsonl" --add_bos --add_eos
    done

    echo "== a $MODEL_CARD base model, pretrained on the broader corpus"
    pretrain
    base="$(last_checkpoint "$WORK_DIR/base")"
    echo "== LoRA on the frozen base"
    fine_tune "$base"

    echo "== beam search, decoding and scores, of the base alone and with LoRA"
    generate "$base" 0 base.jsonl
    generate "$(last_checkpoint "$WORK_DIR")" "$LORA_DIM" lora.jsonl
    decode "$WORK_DIR/base.jsonl" "$WORK_DIR/ref.txt" "$WORK_DIR/base.txt"
    decode "$WORK_DIR/lora.jsonl" "$WORK_DIR/ref.txt" "$WORK_DIR/lora.txt"
    score_to "$WORK_DIR/base_scores.txt" "$WORK_DIR/ref.txt" "$WORK_DIR/base.txt"
    score_to "$WORK_DIR/lora_scores.txt" "$WORK_DIR/ref.txt" "$WORK_DIR/lora.txt"
    python data/demo/report.py "$DATA/test_formatted.jsonl" "$WORK_DIR"
}

pretrain() {
    launch src/gpt2_ft.py \
        --train_data "$DATA/base_train.jsonl" \
        --valid_data "$DATA/base_valid.jsonl" \
        --train_batch_size 4 \
        --valid_batch_size 16 \
        --seq_len 64 \
        --model_card "$MODEL_CARD" \
        --obj jlm \
        --lora_dim 0 \
        --lr 0.003 \
        --correct_bias \
        --scheduler linear \
        --warmup_step 400 \
        --max_step "$BASE_STEPS" \
        --eval_interval 300 \
        --save_interval 100000 \
        --work_dir "$WORK_DIR/base" \
        --random_seed "$SEED" \
        --resume "$RESUME" \
        --device "$DEVICE"
}

prepare() {
    source ./setup.sh
    python vocab/download_vocab.py vocab
}

"run_${1:-e2e}"
