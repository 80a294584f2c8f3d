#!/usr/bin/env bash
# Fetches GPT-2 into pretrained_checkpoints/:
#     bash download_pretrained_checkpoints.sh [sm|md|lg ...]      (default: sm, 548 MB)
# Run it again to resume. Variable: HF_ENDPOINT sets a mirror of https://huggingface.co.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
exec python pretrained_checkpoints/download_checkpoints.py "$@"
