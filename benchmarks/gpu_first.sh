#!/bin/sh
# The first minutes on a GPU: see benchmarks/gpu_first.py, which this starts with the Python of the project, if it has
# one of its own, or else the one in PATH (another one: PYTHON=/path/to/python benchmarks/gpu_first.sh).
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
exec "$PYTHON" "$root/benchmarks/gpu_first.py" "$@"
