#!/usr/bin/env bash
# Fetches GPT-2 into pretrained_checkpoints/:
#     bash download_pretrained_checkpoints.sh [sm|md|lg ...]      (default: sm, 548 MB)
# Run it again to resume. HF_ENDPOINT sets a mirror of https://huggingface.co.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
exec python pretrained_checkpoints/download_checkpoints.py "$@"
