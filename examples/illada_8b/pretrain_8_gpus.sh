#!/usr/bin/env bash
# Pretrain iLLaDA-8B on one node of 8 GPUs. Fields can be changed on the command line:
#
#     examples/illada_8b/pretrain_8_gpus.sh training.lr=1e-4 checkpoint.save_dir=/scratch/run/checkpoints
#
# Started again it continues from its newest complete checkpoint. Not run on GPUs yet: `bash -n` and a dry run of the
# configuration are all that was checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export CUDA_DEVICE_MAX_CONNECTIONS=1 # kernels start in the order in which they were issued, so collectives overlap
export OMP_NUM_THREADS=8

# SIGTERM and SIGINT make the ranks save and stop: give them longer than torchrun's 30 seconds.
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node 8 --shutdown-timeout 600 \
    -m illada_megatron train --config examples/illada_8b/config.yaml "$@"
