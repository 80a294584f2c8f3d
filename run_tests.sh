#!/usr/bin/env bash
# Sets up whatever is needed, then runs ruff and pytest: `bash run_tests.sh [PYTEST_ARGUMENT...]`.
# Exit code 0 only if both are content.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
setup_install_packages "a few minutes, PyTorch is among them" requirement-test.txt requirement.txt
python vocab/download_vocab.py vocab

failed=0
python -m ruff check . || failed=1
python -m pytest "$@" || failed=1
exit "$failed"
