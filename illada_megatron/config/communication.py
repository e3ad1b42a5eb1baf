"""Which ways for ranks to talk fit together: the checks of gradients, overlap and determinism for `layout.py`."""

from illada_megatron.config.schema import ParallelConfig, RuntimeConfig, TrainingConfig
from illada_megatron.config.schema.precision import Fp8Config


def check_gradients(parallel: ParallelConfig, fp8_parameters: bool) -> None:
    """How gradients and weights are exchanged over data parallel. fp8_parameters: these are FP8's. Raises
    ValueError with the fields and the fix."""
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ValueError(
            "parallel.overlap_param_gather true needs use_distributed_optimizer and overlap_grad_reduce true, found "
            f"{parallel.use_distributed_optimizer} and {parallel.overlap_grad_reduce}"
        )
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        raise ValueError(
            f"parallel.ddp_bucket_size {parallel.ddp_bucket_size} needs overlap_grad_reduce true, without which all "
            "gradients are exchanged at once: set it, or leave ddp_bucket_size out"
        )
    for field, why in {
        "grad_reduce_in_bf16": "without which gradients are all-reduced, and could not be added in fp32",
        "ddp_pad_buckets_for_high_nccl_busbw": "whose buckets alone are filled up",
    }.items():
        if getattr(parallel, field) and not parallel.use_distributed_optimizer:
            raise ValueError(
                f"parallel.{field} true needs use_distributed_optimizer true, {why}: set it, or {field}=false"
            )
    if parallel.grad_reduce_in_bf16 and parallel.overlap_grad_reduce and fp8_parameters:
        # megatron-core exchanges the bf16 parameters' bucket with the last one of FP8, and then asserts that it is one
        raise ValueError(
            "parallel.grad_reduce_in_bf16, overlap_grad_reduce and fp8.param_gather are all true: buckets of bf16 and "
            "of FP8 weights are exchanged together, and megatron-core adds up single ones: set one of them to false"
        )
    if parallel.grad_reduce_in_bf16 and parallel.ddp_average_in_collective:
        raise ValueError(
            "parallel.grad_reduce_in_bf16 and ddp_average_in_collective are both true: NCCL cannot divide what the "
            "ranks add up themselves, in fp32: set one of them to false"
        )


def check_overlap(parallel: ParallelConfig, training: TrainingConfig, runtime: RuntimeConfig, fp8: Fp8Config) -> None:
    """What computing may go on beside. Raises ValueError with the fields and the fix."""
    if parallel.tp_comm_overlap:
        for name, found, wanted, why in (
            ("parallel.sequence_parallel", parallel.sequence_parallel, True, "whose exchanges it overlaps"),
            ("training.deterministic", training.deterministic, False, "its parts are added as they arrive"),
        ):
            if found is not wanted:
                raise ValueError(
                    f"parallel.tp_comm_overlap true needs {name} {str(wanted).lower()} ({why}), found "
                    f"{str(found).lower()}: change it, or set tp_comm_overlap=false"
                )
        if training.precision == "fp32":
            raise ValueError(
                "parallel.tp_comm_overlap true needs training.precision bf16 or lower, found fp32: its buffers are "
                "bf16; change it, or set tp_comm_overlap=false"
            )
        if training.precision == "fp8" and fp8.recipe == "blockwise":
            raise ValueError(
                "parallel.tp_comm_overlap true: Transformer Engine has no such buffers for fp8.recipe blockwise; take "
                "another, or set tp_comm_overlap=false"
            )
        if runtime.device == "cpu" or runtime.transformer_impl == "local":
            raise ValueError(
                "parallel.tp_comm_overlap true needs Transformer Engine on GPUs, found runtime.device "
                f"{runtime.device} and transformer_impl {runtime.transformer_impl}: set tp_comm_overlap=false"
            )
    if parallel.overlap_p2p_comm and parallel.model_chunks == 1:
        raise ValueError(
            "parallel.overlap_p2p_comm true needs virtual_pipeline_model_parallel_size > 1, found "
            f"{parallel.virtual_pipeline_model_parallel_size}: a stage that is not interleaved has nothing to compute "
            "meanwhile; raise it, or leave overlap_p2p_comm out"
        )
    if parallel.overlap_p2p_comm is False and parallel.model_chunks > 1 and parallel.pipeline_model_parallel_size == 2:
        # megatron-core's own check (training/arguments.py)
        raise ValueError(
            "parallel.overlap_p2p_comm false with interleaved stages needs pipeline_model_parallel_size > 2, found 2: "
            "both neighbours of a rank are the same one, and what they send at a time would be mixed up; leave "
            "overlap_p2p_comm out"
        )
