#!/usr/bin/env bash
# run_tests.sh VENV FILE: one file of end-to-end tests. Exits with 77 (skipped) where every test of it was skipped, or where
# the virtual environment is absent; why is said.
set -euo pipefail
venv=$1
file=$2
if [ ! -e "$venv/installed.txt" ]; then
  echo "skipped: no virtual environment (see e2e.environment)"
  exit 77
fi
cd "$(dirname "$0")"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
status=0
"$venv/bin/python" -m pytest -q -rs -p no:cacheprovider "$file" 2>&1 | tee "$output" || status=$?
if [ "$status" -eq 0 ] && ! grep -qE '[0-9]+ passed' "$output"; then
  exit 77
fi
exit "$status"
