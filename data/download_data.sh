#!/usr/bin/env bash
# Fetches the official files of the data sets into data/ and verifies them:
#     bash data/download_data.sh [e2e] [webnlg] [dart]      (default: e2e)
# Run it again to resume. Variables: E2E_SOURCE=DIR, WEBNLG_SOURCE and DART_SOURCE copy them from a
# folder instead; GITHUB_RAW sets a mirror of https://raw.githubusercontent.com; E2E_URL, WEBNLG_URL
# and DART_URL set the URL of the folder that has a data set's files.

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=setup.sh
source "$here/../setup.sh"
exec python "$here/download_data.py" "$@" --data_dir "$here"
