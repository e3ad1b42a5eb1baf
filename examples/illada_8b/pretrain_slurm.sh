#!/usr/bin/env bash
#SBATCH --job-name=illada-8b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/illada_8b/slurm-%j.log
# Pretrain iLLaDA-8B on 128 nodes x 8 = 1,024 GPUs. From the repository's root, with the log's folder made before:
#
#     mkdir -p runs/illada_8b && sbatch examples/illada_8b/pretrain_slurm.sh training.lr=1e-4
#
# 15 minutes before the time limit Slurm sends USR1 to this script: the ranks save, and the job is queued again. After
# a failed node Slurm itself does that (--requeue). Either way the run continues from its newest complete checkpoint.
# Not run under Slurm or on GPUs yet: `bash -n` and a dry run of the configuration for 1,024 ranks are all that was
# checked.
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1 # kernels start in the order in which they were issued, so collectives overlap
export OMP_NUM_THREADS=8

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

save_and_requeue() {
    echo "time limit is near: saving, then queued again"
    # torchrun hands TERM on to the ranks, which finish their step, save and leave
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap save_and_requeue USR1

srun --kill-on-bad-exit=1 "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    --shutdown-timeout 600 \
    -m illada_megatron train --config examples/illada_8b/config_1024_gpus.yaml "$@" &
step=$!
wait "$step" # returns as soon as the trap has to run; the status is the run's otherwise
