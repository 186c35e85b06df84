#!/usr/bin/env bash
# Run the package's tests with the oldest releases of what it needs, torch aside; arguments go to pytest. They are installed first, once,
# to be found before those of requirements.txt; another torch, after them, is found by PYTHONPATH.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
folder=".venv/oldest-releases" list="tests/oldest-releases.txt"
if ! cmp -s "$list" "$folder/installed"; then
    echo "installing $list"
    rm -rf "$folder"
    install --no-deps --target "$folder" -r "$list"
    cp "$list" "$folder/installed"
fi
export PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}"
gpu_only="tests/test_modeling.py::test_layers_are_spread_whole_over_several_gpus[auto]"  # before 1.15 accelerate asks for one there
exec python -m pytest -n 2 --dist loadfile --deselect "$gpu_only" tests/test_{main,plugin,modeling,vocabulary,decoding,serving}.py "$@"
