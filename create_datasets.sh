#!/usr/bin/env bash
# Converts raw text to token ids (stages 1 and 2) as the experiment does: 1/100 of the data, drawn
# with a fixed seed. FRACTION=1 takes all of it, DATA_DIR sets another folder.

set -euo pipefail
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
