#!/usr/bin/env bash
# Run the package's tests with the oldest releases of what it needs, torch aside; arguments go to pytest. They are installed first, once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! cmp -s tests/oldest.txt .venv/oldest/installed; then
    echo "installing tests/oldest.txt"
    rm -rf .venv/oldest
    install --no-deps --target .venv/oldest -r tests/oldest.txt
    cp tests/oldest.txt .venv/oldest/installed
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD/.venv/oldest"
gpu_only="tests/test_modeling.py::test_layers_are_spread_whole_over_several_gpus[auto]"  # before 1.15 accelerate asks for one there
exec python -m pytest -n 2 --dist loadfile --deselect "$gpu_only" tests/test_{main,plugin,modeling,decoding}.py "$@"
