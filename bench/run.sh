#!/usr/bin/env bash
# Measures this project and other programs in the same run:
#
#   bash bench/run.sh train    a training step, memory, start-up
#   bash bench/run.sh beam     beam search
#   bash bench/run.sh scale    cost against batch size, sequence length and model size
#
# The benchmark's own flags follow its name; --help lists them. Results go to bench/results/.

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ ! -f "$root/bench/bench_${1:-}.py" ]]; then
    echo "usage: bash bench/run.sh train|beam|scale [FLAG...]" >&2
    exit 2
fi
source "$root/setup.sh"
setup_install_packages "a few minutes, PyTorch is among them" requirement-bench.txt \
    requirement-test.txt requirement.txt

exec python "$root/bench/bench_$1.py" "${@:2}"
