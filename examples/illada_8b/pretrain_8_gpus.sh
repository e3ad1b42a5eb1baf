#!/usr/bin/env bash
# Pretrain iLLaDA-8B on one node of 8 GPUs. Fields can be changed on the command line:
#
#     examples/illada_8b/pretrain_8_gpus.sh training.lr=1e-4 checkpoint.save_dir=/scratch/run/checkpoints
#     CONFIG=examples/illada_8b/config_fp8.yaml examples/illada_8b/pretrain_8_gpus.sh
#
# Failed ranks start again from the newest complete checkpoint, up to 10 times; so does the whole command. SIGTERM and
# Ctrl-C make the ranks save and stop. Not run on GPUs yet: shellcheck and a dry run of the configuration are all that was
# checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export CUDA_DEVICE_MAX_CONNECTIONS=1 # kernels start in the order in which they were issued, so collectives overlap
export OMP_NUM_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # masked rows differ in number each micro-batch

exec "${PYTHON:-python3}" -m illada_megatron train --nproc 8 --max-restarts 10 \
    --config "${CONFIG:-examples/illada_8b/config.yaml}" "$@"
