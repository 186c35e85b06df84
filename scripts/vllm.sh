#!/usr/bin/env bash
# Run tests/test_vllm.py with vLLM for CPUs, in an environment of its own, which is made the first time: vLLM pins torch, and much else.
# Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
wanted=$(cat tests/vllm.txt pyproject.toml | sha256sum)
if [ "$(cat .venv/vllm/installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing tests/vllm.txt"
    rm -rf .venv/vllm
    python -m venv .venv/vllm
    .venv/vllm/bin/pip install --disable-pip-version-check -q -r tests/vllm.txt
    .venv/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec  # for other models than text's; they must fit torch's build
    .venv/vllm/bin/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
    echo "$wanted" > .venv/vllm/installed
fi
exec .venv/vllm/bin/python -m pytest tests/test_vllm.py "$@"
