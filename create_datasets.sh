#!/usr/bin/env bash
# Converts raw text to token ids (stages 1 and 2) as the experiment does: 1/100 of the data, drawn
# with a fixed seed. Usage: bash create_datasets.sh
#
# Variables: DATA_DIR (data/e2e) is the folder of train.txt, valid.txt and test.txt;
# FRACTION (0.01) is the share of them to draw, 1 takes all.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")"

path="${DATA_DIR:-data/e2e}"
fraction="${FRACTION:-0.01}"
for name in train test valid; do
    if [[ ! -f "$path/$name.txt" ]]; then
        echo "error: $path/$name.txt: no such file; run: bash data/download_data.sh" >&2
        exit 1
    fi
done

source ./setup.sh
setup_lock "$path" data "wait until it ends, or set DATA_DIR to another folder"
python vocab/download_vocab.py vocab

create() {  # NAME
    python src/format_converting_e2e.py "$path/$1.txt" "$path/$1_formatted.jsonl" \
        --fraction "$fraction"
    python src/gpt2_encode.py --vocab vocab --input "$path/$1_formatted.jsonl" \
        --output "$path/$1.jsonl" --add_bos --add_eos
}

echo "creating e2e datasets..."
echo "train..."
create train
echo "test..."
create test
echo "valid..."
create valid
echo "script complete!"
