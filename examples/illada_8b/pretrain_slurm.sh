#!/usr/bin/env bash
#SBATCH --job-name=illada-8b
#SBATCH --nodes=130
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=runs/illada_8b/slurm-%j.log
# Pretrain iLLaDA-8B on 128 nodes x 8 = 1,024 GPUs, with two spare nodes. From the repository's root, with the log's
# folder made before:
#
#     mkdir -p runs/illada_8b && sbatch examples/illada_8b/pretrain_slurm.sh training.lr=1e-4
#
# Other runs of this size, in FP8 and of 70B parameters:
#
#     CONFIG=examples/illada_8b/config_1024_gpus_fp8.yaml sbatch examples/illada_8b/pretrain_slurm.sh
#     CONFIG=examples/illada_70b/config_1024_gpus.yaml sbatch --job-name=illada-70b examples/illada_8b/pretrain_slurm.sh
#
# What happens when something fails; each time the run goes on from its newest complete checkpoint:
# - a rank dies: all ranks start again where they are (--max-restarts);
# - a node is lost: a spare one takes its place; when none is left, the others go on without it, as cheaply as the
#   layouts of the configuration allow. Where the first node is the lost one, the job ends; Slurm queues it again
#   where it knows of the failed node (--requeue);
# - the time limit is near: 15 minutes before it Slurm sends USR1 to this script: the ranks save, the job is queued again.
# What the run does on each number of nodes: `illada train --dry-run --nproc 8 --nnodes 64:128 --config FILE`.
# Not run under Slurm or on GPUs yet: shellcheck and that dry run are all that was checked.
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1 # kernels start in the order in which they were issued, so collectives overlap
export OMP_NUM_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # masked rows differ in number each micro-batch
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 # seconds to save in, where ranks start again because a node has come

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

save_and_requeue() {
    echo "time limit is near: saving, then queued again"
    # the launchers hand TERM on to the ranks, which finish their step, save and leave
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap save_and_requeue USR1

# one launcher a node, which starts that node's eight ranks; a launcher that ends does not take the others with it
srun --no-kill --kill-on-bad-exit=0 "${PYTHON:-python3}" -m illada_megatron train \
    --nproc 8 --nnodes 64:128 --max-restarts 100 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head_node:29500" \
    --config "${CONFIG:-examples/illada_8b/config_1024_gpus.yaml}" "$@" &
step=$!
wait "$step" # returns as soon as the trap has to run; the status is the run's otherwise
