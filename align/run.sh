#!/usr/bin/env bash
# Trains, generates, decodes and scores with PyTorch and with Jittor, and compares the two:
#
#   bash align/run.sh e2e --strict --card gpt2.nano --base random
#
# --help lists all flags.

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/setup.sh"
setup_install_packages "a few minutes, PyTorch is among them" requirement-test.txt requirement.txt
python "$root/vocab/download_vocab.py" "$root/vocab"

exec python "$root/align/run.py" "$@"
