#!/usr/bin/env bash
# Pretrain a 1B-class iLLaDA on one GPU. Fields can be changed on the command line:
#
#     examples/one_h100/pretrain.sh training.precision=fp8
#
# A failed rank starts again from the newest complete checkpoint, up to 10 times; so does the whole command. SIGTERM and
# Ctrl-C make it save and stop. Not run on a GPU yet: shellcheck and a dry run of the configuration are all that was
# checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # masked rows differ in number each micro-batch

exec "${PYTHON:-python3}" -m illada_megatron train --nproc 1 --max-restarts 10 \
    --config examples/one_h100/config.yaml "$@"
