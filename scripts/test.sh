#!/usr/bin/env bash
# Run all tests, two files at a time; arguments go to pytest (-n 0: one after the other). The readers of exported models are
# installed first, once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! cmp -s tests/requirements.txt .venv/installed-readers; then
    echo "installing tests/requirements.txt"
    install --no-deps --no-build-isolation -r tests/requirements.txt
    cp tests/requirements.txt .venv/installed-readers
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # a thread for each process: more than there are cores wait for each other
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # files of few tests, which may be slow, do not come last
