#!/usr/bin/env bash
# Installs what is needed into .venv and runs the linter and the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh

install
step "lint" .venv/bin/ruff check .
step "format" .venv/bin/ruff format --check .
step "tests" .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
