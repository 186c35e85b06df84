#!/usr/bin/env bash
# Quantize SmolLM2-135M-Instruct on this machine, compare with fp16 and two baselines, and let it write a sentence.
#   bash scripts/quickstart.sh [--fast]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python scripts/demo.py "$@"
