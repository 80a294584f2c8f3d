#!/usr/bin/env bash
# Trains, generates, decodes and scores with PyTorch and with Jittor, and compares the two:
#
#   bash align/run.sh demo|e2e|webnlg|dart|FOLDER [FLAG...]
#   bash align/run.sh webnlg --strict --card gpt2.nano
#
# demo needs `bash work.sh demo` first, gpt2.nano `bash align/base.sh`; a FOLDER has train.jsonl,
# valid.jsonl, test.jsonl and test_formatted.jsonl.
#
#   --strict             no LoRA dropout, and exit code 1 if a difference is too large
#   --precision TYPE     float32 or bf16, of both sides; bf16 with --strict compares with float64
#   --float64            PyTorch in float64, too, and the distance of both sides to it
#   --card CARD          gpt2.nano, gpt2.sm, gpt2.md or gpt2.lg
#   --base FILE|random   base model
#   --steps N            micro-batches to train
#   --ref_type TYPE      e2e, webnlg or dart: how a FOLDER is decoded and scored
#   --seeds "N N N"      one run for each seed
#   --inputs N           different inputs from the start of the test set
#   --batch_sizes "N N"  batch sizes of Jittor's beam search
#   --train_flags FLAGS  flags for both training scripts: --train_flags="--lr 0.001 --clip 1"
#   --device DEVICE      auto, cpu or cuda
#   --name NAME          name of the result
#   --work_dir FOLDER    for the files of both sides
#   --results FOLDER     for the report
#   --report_only        run nothing, report on the files in --work_dir again

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
setup_extra=requirement-test.txt
source "$root/setup.sh"
python "$root/vocab/download_vocab.py" "$root/vocab"

exec python "$root/align/run.py" "$@"
