#!/usr/bin/env bash
# Installs what is needed, then runs the linters and pytest: bash run_tests.sh [PYTEST_ARGUMENT...]
# -m "not slow" leaves out the slow tests, --nightly adds the longest. The exit code is 0 only if
# all of them pass.
#
# Variables: E2E_SHARED (folder of reference files, without it their tests are skipped), TEST_DEVICE
# (cpu or cuda), KILLS, KILLS_SEED, FUZZ_EXAMPLES; docs/reference.md explains them.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")"
setup_extra=requirement-test.txt
source ./setup.sh
python vocab/download_vocab.py vocab

failed=0
check() {  # COMMAND...
    "$@" || failed=1
}
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
mapfile -t english < <(git ls-files ':!*.cn.md' ':!*/results/*')
check python -m ruff check .
check codespell "${english[@]}"
check shellcheck -x "${scripts[@]}"
check clang-format --dry-run --Werror src/ops/*.h src/ops/*.cuh
check python -m mypy
check python -m pytest "$@"
exit "$failed"
