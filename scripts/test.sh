#!/usr/bin/env bash
# Run all tests; arguments go to pytest. The readers of exported models are installed first, once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! cmp -s tests/requirements.txt .venv/installed-readers; then
    echo "installing tests/requirements.txt"
    install --no-deps --no-build-isolation -r tests/requirements.txt
    cp tests/requirements.txt .venv/installed-readers
fi
exec python -m pytest "$@"
