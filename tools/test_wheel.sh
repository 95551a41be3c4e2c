#!/usr/bin/env bash
# Installs a wheel into a new environment and runs the tests from a folder without the source tree.
# Usage: tools/test_wheel.sh PYTHON WHEEL TORCH [pytest arguments]
# Tests that compile or read csrc do not run: tests/cuda and those marked `source`.
set -euo pipefail

python=$(command -v "$1") wheel=$(realpath "$2") torch=$3
shift 3
root=$(realpath "$(dirname "$0")/..")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --disable-pip-version-check --quiet)
"${pip[@]}" "$torch"
"${pip[@]}" "$wheel[test]"

mkdir "$folder/tree"
cp -r "$root"/{tests,zoo,bench,tools,docs,Makefile,*.md,mkdocs.yml,pyproject.toml} "$folder/tree"
cd "$folder/tree"
unset PYTHONPATH
export BDPRUNE_DATA=${BDPRUNE_DATA:-$root/../shared/data} BDPRUNE_WHEEL=$wheel
"$folder/env/bin/python" -m pytest -m "not source" --ignore tests/cuda "$@"
