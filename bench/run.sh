#!/usr/bin/env bash
# Measures this project and other programs in the same run:
#
#   bash bench/run.sh train    a training step, memory, start-up
#   bash bench/run.sh beam     beam search
#   bash bench/run.sh scale    cost against batch size, sequence length and model size
#
# Results go to bench/results/. The flags of a benchmark follow its name:
#
#   all    --device cpu|cuda, --name NAME (of the result), --quiet SHARE (a round in which other
#          programs take more of the processors is measured again; 1: every round counts), --isa avx2
#          (all sides without newer instructions than AVX2)
#   train  --card CARD, --rounds N (blocks of each side), --block N (micro-batches of a block),
#          --warm_up N (micro-batches before them), --runs N (whole runs, for memory and start-up)
#   beam   --card CARD, --checkpoint FILE (trained weights), --samples N (contexts one at a time),
#          --batch_size N and --batches N (contexts at the same time, number of such batches)
#   train and beam: --precisions float32,bf16,int8, --sides NAME,NAME (beside ours in float32):
#          of train: ours, align, peft, torch, compiled (minimal PyTorch, eager and compiled)
#          of beam: ours, ctranslate2, openvino, compiled (minimal PyTorch), generate, align
#   scale  --cards CARD,CARD, --batch_sizes N,N and --seq_lens N,N (training), --beam_sizes N,N,
#          --rounds N (blocks of each side), --seconds SECONDS (no further block after them)

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ ! -f "$root/bench/bench_${1:-}.py" ]]; then
    echo "usage: bash bench/run.sh train|beam|scale [FLAG...]" >&2
    exit 2
fi
setup_extra=requirement-bench.txt
source "$root/setup.sh"

exec python "$root/bench/bench_$1.py" "${@:2}"
