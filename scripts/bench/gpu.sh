#!/usr/bin/env bash
# What a GPU does with this code, in minutes: versions, tests, speed, memory. docs/gpu.md says how to read it.
#   bash scripts/bench/gpu.sh [--minutes 8] [--out_dir out/gpu]
# Uses the Python it is started with ($PYTHON, else python3) and installs nothing; wheels that this lacks are
# read from $GPU_WHEELS, a folder. Without a GPU: --device cpu --tiny.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

if [ -n "${GPU_WHEELS:-}" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    for wheel in "$GPU_WHEELS"/*.whl; do
        [ -f "$wheel" ] || { echo "error: GPU_WHEELS: no wheel in $GPU_WHEELS" >&2; exit 1; }
        "$python" -m zipfile -e "$wheel" "$packages" # which leaves out what would lie outside
    done
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" scripts/bench/gpu.py "$@"
