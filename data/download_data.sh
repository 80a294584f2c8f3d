#!/usr/bin/env bash
# Fetches the three official E2E files into data/e2e/: bash data/download_data.sh
# Run it again to resume. Variables: E2E_SOURCE=DIR copies them from a folder instead, E2E_URL sets
# another URL to download from.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=setup.sh
source "$here/../setup.sh"
exec python "$here/download_data.py" "$here/e2e"
