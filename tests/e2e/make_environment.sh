#!/usr/bin/env bash
# make_environment.sh PYTHON VENV: the virtual environment of the end-to-end tests; nothing to do where it is current.
# Exits with 77 (skipped) where it cannot be made, which is to say without a network.
set -euo pipefail
python=$1
venv=$2
requirements=$(dirname "$0")/requirements.txt

if cmp -s "$requirements" "$venv/installed.txt"; then
  exit 0
fi
rm -rf "$venv"
if ! "$python" -m venv "$venv" || ! "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"; then
  echo "skipped: the packages of tests/e2e/requirements.txt cannot be installed (no network?)"
  exit 77
fi
cp "$requirements" "$venv/installed.txt"
