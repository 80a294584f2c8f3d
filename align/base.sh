#!/usr/bin/env bash
# Pretrains the gpt2.nano from which the alignment runs start, on the training texts of E2E, WebNLG
# and DART:
#
#   bash align/base.sh [FILE ...]
#
# The FILEs hold converted texts (stage 1); without them, the raw training files in data/ are
# converted whole. Every 100th text is for validation. The flags are in align/base.ini. Variable:
# BASE_DIR (trained_models/align_base) is the folder of all that is written; its last line names the
# model. Run it again to go on after a break.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(realpath -m -- "${BASE_DIR:-$root/trained_models/align_base}")"
texts=()
for file in "$@"; do
    [[ -f "$file" ]] || { echo "error: $file: no such file; give converted texts" >&2; exit 1; }
    texts+=("$(realpath -- "$file")")
done
cd "$root"
raw=(e2e:data/e2e/train.txt webnlg:data/webnlg_challenge_2017/train.json
    dart:data/dart/dart-v1.1.1-full-train.json)
source ./setup.sh
setup_lock "$folder" work "wait until it ends, or set BASE_DIR to another folder"
python vocab/download_vocab.py vocab
if (( $# == 0 )); then
    for file in "${raw[@]}"; do
        if [[ ! -f "${file#*:}" ]]; then
            echo "${file#*:}: not there, left out"
            continue
        fi
        texts+=("$folder/${file%%:*}_formatted.jsonl")
        python "src/format_converting_${file%%:*}.py" "${file#*:}" "${texts[-1]}" --fraction 1
    done
fi
if (( ${#texts[@]} == 0 )); then
    echo "error: no training text; run: bash data/download_data.sh e2e webnlg dart" >&2
    exit 1
fi
# awk divides the files into lines itself, since the last line of one may have no line end.
folder="$folder" awk '
    BEGIN {
        train = ENVIRON["folder"] "/train_formatted.jsonl"
        valid = ENVIRON["folder"] "/valid_formatted.jsonl"
        printf "" > train
        printf "" > valid
    }
    { print > (NR % 100 ? train : valid) }' "${texts[@]}"
for name in train valid; do
    python src/gpt2_encode.py --vocab vocab --input "$folder/${name}_formatted.jsonl" \
        --output "$folder/$name.jsonl" --add_bos --add_eos
done
python src/gpt2_ft.py @align/base.ini --train_data "$folder/train.jsonl" \
    --valid_data "$folder/valid.jsonl" --work_dir "$folder" --resume auto --device cpu
