#!/usr/bin/env bash
# The tests of the Transformer Engine path on the real package, compiled module and all, on a machine without a GPU:
# Python 3.12, the CUDA build of torch, megatron-core 0.19, Transformer Engine 2.20. What `make test-te` runs.
#   tools/test_te.sh [VENV]     VENV: .venv-te; made where it is not complete (about 5 GB; the compiled module takes
#                               47 CPU minutes, and CUDA's headers: CUDA_HOME, default /usr/local/cuda)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-te}
te=2.20.2

if [ ! -e "$venv/.te-$te" ]; then
    python=""
    for candidate in "${PYTHON:-python3.12}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "no Python 3.12 was found (PYTHON, python3.12 on the PATH, or pyenv's)" >&2
        exit 1
    fi
    cuda=${CUDA_HOME:-/usr/local/cuda}
    if [ ! -d "$cuda/include" ]; then
        echo "$cuda/include: no such directory, expected the CUDA toolkit's headers: set CUDA_HOME" >&2
        exit 1
    fi
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
    pip install --quiet -r requirements.txt pytest==9.2.0
    # its requirements, and the libraries; the module is compiled below, against them and torch
    pip install --quiet einops onnx onnxscript importlib-metadata nvdlfw-inspect ninja
    pip install --quiet --no-deps "transformer-engine==$te" "transformer-engine-cu13==$te"
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    for folder in "$packages"/nvidia/*/include; do
        CPATH=$folder${CPATH:+:$CPATH}
    done
    for folder in "$packages"/nvidia/*/lib; do
        LIBRARY_PATH=$folder${LIBRARY_PATH:+:$LIBRARY_PATH}
    done
    export CPATH LIBRARY_PATH
    CUDA_HOME=$cuda MAX_JOBS=${MAX_JOBS:-2} NVTE_FRAMEWORK=pytorch \
        pip install --quiet --no-deps --no-build-isolation "transformer-engine-torch==$te"
    ILLADA_CUDA=0 pip install --quiet --no-deps --no-build-isolation -e .
    touch "$venv/.te-$te"
fi
exec "$venv/bin/python" -m pytest -rs tests/te
