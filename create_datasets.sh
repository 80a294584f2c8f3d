#!/usr/bin/env bash
# Converts raw text to token ids (stages 1 and 2) as the experiment does: 1/100 of the data, drawn
# with a fixed seed.
#
#   bash create_datasets.sh [e2e] [webnlg] [dart]      (default: those whose raw files are there)
#
# Variables: FRACTION (0.01) is the share of the data to draw, 1 takes all; PRESET=paper writes the
# whole data to a folder `whole` beside the raw files; DATA_DIR is the folder of the raw files of one
# data set (data/e2e, data/webnlg_challenge_2017 or data/dart).

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {  # EXIT_CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

# Sets `path`, the folder of a data set, and `files`, its raw files for train, test and valid.
choose() {  # DATA_SET
    case "$1" in
    e2e) path=data/e2e files=(train.txt test.txt valid.txt) ;;
    webnlg) path=data/webnlg_challenge_2017 files=(train.json test.json dev.json) ;;
    dart) path=data/dart files=(dart-v1.1.1-full-{train,test,dev}.json) ;;
    *) fail 2 "$1: no data set; usage: bash create_datasets.sh [e2e] [webnlg] [dart]" ;;
    esac
    path="${DATA_DIR:-$path}"
}

create() {  # DATA_SET RAW_FILE NAME
    local formatted="$target/$3_formatted.jsonl"
    echo "$3..."
    python "src/format_converting_$1.py" "$path/$2" "$formatted" --fraction "$fraction"
    python src/gpt2_encode.py --vocab vocab --input "$formatted" --output "$target/$3.jsonl" \
        --add_bos --add_eos
}

case "${PRESET:-}" in
"") fraction="${FRACTION:-0.01}" ;;
paper)
    fraction=1
    [[ -z "${FRACTION:-}" || "$FRACTION" == 1 ]] ||
        fail 2 "FRACTION=$FRACTION: PRESET=paper takes the whole data"
    ;;
*) fail 2 "PRESET=$PRESET: must be paper, or not set" ;;
esac
asked=("$@")
[[ -z "${DATA_DIR:-}" ]] || (( $# )) || asked=(e2e)
[[ -z "${DATA_DIR:-}" ]] || (( ${#asked[@]} == 1 )) ||
    fail 2 "DATA_DIR=$DATA_DIR: the folder of one data set; name only one"

there=()
for name in $( (( ${#asked[@]} )) && echo "${asked[@]}" || echo e2e webnlg dart); do
    choose "$name"
    missing=()
    for file in "${files[@]}"; do
        [[ -f "$path/$file" ]] || missing+=("$path/$file")
    done
    if (( ${#missing[@]} == 0 )); then
        there+=("$name")
    elif (( ${#asked[@]} || ${#missing[@]} < ${#files[@]} )); then
        fail 1 "${missing[0]}: no such file; run: bash data/download_data.sh $name"
    else
        echo "$name: not there, left out; to have it, run: bash data/download_data.sh $name"
    fi
done
(( ${#there[@]} )) || fail 1 "no data set is there; run: bash data/download_data.sh"

source ./setup.sh
python vocab/download_vocab.py vocab
for name in "${there[@]}"; do
    choose "$name"
    setup_lock "$path" data "wait until it ends, or set DATA_DIR to another folder"
    target="$path${PRESET:+/whole}"
    echo "creating $name datasets..."
    create "$name" "${files[0]}" train
    create "$name" "${files[1]}" test
    create "$name" "${files[2]}" valid
done
echo "script complete!"
