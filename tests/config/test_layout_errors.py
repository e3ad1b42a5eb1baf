"""A layout that cannot work is refused before anything starts: the field, the numbers, and what to change."""

import pytest

from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.config.layout import layout_rows, resolve_layout, row_tokens

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
VP = "parallel.virtual_pipeline_model_parallel_size"

# overrides of the defaults (4 layers, 8 heads, 2 groups, ffn 704, vocabulary 8000 -> 8064) -> parts of the message
IMPOSSIBLE = {
    "feed-forward": (
        [f"{TP}=3", "model.num_query_groups=3", "model.num_attention_heads=9", "model.hidden_size=288"],
        ["model.ffn_hidden_size 704 is not a multiple of", f"{TP} 3", "change model.ffn_hidden_size or the layout"],
    ),
    "query groups": ([f"{TP}=4"], ["model.num_query_groups 2", f"{TP} 4", "change model.num_query_groups"]),
    "attention heads": (
        [f"{TP}=4", "model.num_attention_heads=2", "model.num_query_groups=1"],
        ["model.num_attention_heads 2", f"{TP} 4", "change model.num_attention_heads"],
    ),
    "vocabulary": (
        [f"{TP}=2", "model.vocab_size=7999", "model.make_vocab_size_divisible_by=1"],
        ["model.padded_vocab_size 7999", f"{TP} 2", "change model.make_vocab_size_divisible_by"],
    ),
    "layers": ([f"{PP}=3"], ["model.num_layers 4", "virtual pipeline size 3", f"change model.num_layers, {PP}"]),
    "layers of chunks": ([f"{PP}=2", f"{VP}=4"], ["model.num_layers 4", "virtual pipeline size 8"]),
    "chunks without pipeline": ([f"{VP}=2"], [f"{VP} 2 needs {PP} > 1, found 1", "leave the interleaving out"]),
    "sequence parallel alone": (
        ["parallel.sequence_parallel=true"],
        ["sequence_parallel true needs", f"{TP} > 1, found 1", "set sequence_parallel=false"],
    ),
    "odd tokens": (
        ["parallel.sequence_parallel=true", f"{TP}=2", "data.sequence_length=511"],
        ["training.micro_batch_size * data.sequence_length 511", f"{TP} 2", "change one of them"],
    ),
    "chunks of a sequence": (
        [f"{CP}=3", "data.sequence_length=512"],
        ["data.sequence_length 512 is not a multiple of 2 *", f"{CP} 3", "change one of them"],
    ),
    "kept at intervals alone": (
        ["checkpoint.keep_every=1000"],
        ["checkpoint.keep_every 1000 needs checkpoint.keep_last", "leave keep_every out"],
    ),
    "gather without shards": (
        ["parallel.overlap_param_gather=true", "parallel.use_distributed_optimizer=false"],
        ["overlap_param_gather true needs use_distributed_optimizer and overlap_grad_reduce", "False and False"],
    ),
    "buckets of nothing": (
        ["parallel.ddp_bucket_size=1000"],
        ["ddp_bucket_size 1000 needs overlap_grad_reduce true", "leave ddp_bucket_size out"],
    ),
    "bf16 gradients without shards": (
        ["parallel.grad_reduce_in_bf16=true", "parallel.use_distributed_optimizer=false"],
        ["grad_reduce_in_bf16 true needs use_distributed_optimizer true", "or grad_reduce_in_bf16=false"],
    ),
    "padded buckets without shards": (
        ["parallel.ddp_pad_buckets_for_high_nccl_busbw=true", "parallel.use_distributed_optimizer=false"],
        ["ddp_pad_buckets_for_high_nccl_busbw true needs use_distributed_optimizer true"],
    ),
    "averaged bf16 gradients": (
        ["parallel.grad_reduce_in_bf16=true", "parallel.ddp_average_in_collective=true"],
        ["grad_reduce_in_bf16 and ddp_average_in_collective are both true", "set one of them to false"],
    ),
    "overlap without what it overlaps": (
        [f"{TP}=2", "parallel.tp_comm_overlap=true"],
        ["tp_comm_overlap true needs parallel.sequence_parallel true", "found false", "or set tp_comm_overlap=false"],
    ),
    "overlap in one order": (
        [f"{TP}=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true", "training.deterministic=true"],
        ["tp_comm_overlap true needs training.deterministic false", "found true"],
    ),
    "overlap in fp32": (
        [f"{TP}=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true", "training.precision=fp32"],
        ["tp_comm_overlap true needs training.precision bf16 or lower, found fp32"],
    ),
    "overlap of local layers": (
        [
            *(f"{TP}=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true"),
            *("training.precision=bf16", "runtime.transformer_impl=local"),
        ],
        ["tp_comm_overlap true needs Transformer Engine on GPUs", "transformer_impl local"],
    ),
    "overlap of plain stages": (
        [f"{PP}=2", "parallel.overlap_p2p_comm=true"],
        ["overlap_p2p_comm true needs virtual_pipeline_model_parallel_size > 1, found None", "leave overlap_p2p_comm"],
    ),
    "two neighbours that are one": (
        [f"{PP}=2", f"{VP}=2", "parallel.overlap_p2p_comm=false"],
        ["overlap_p2p_comm false with interleaved stages needs pipeline_model_parallel_size > 2, found 2"],
    ),
    "bf16 moments of a slow average": (
        ["optimizer.moments_dtype=bf16", "optimizer.adam_beta2=0.999"],
        ["moments_dtype bf16 needs adam_beta2 of 0.99 at most, found 0.999", "set moments_dtype=fp32"],
    ),
    "too long": (
        ["data.sequence_length=9000"],
        ["data.sequence_length 9000", "model.max_sequence_length 8192", "change one of them"],
    ),
    "rates": (["schedule.min_lr=1.0", "training.lr=0.5"], ["schedule.min_lr 1.0", "training.lr 0.5", "lower it"]),
    "ramp-up steps": (
        ["training.rampup_batch_size=[2,4,100]"],
        ["training.rampup_batch_size: from 2 in steps of 4", "training.global_batch_size 8"],
    ),
    "ramp-up start": (["training.rampup_batch_size=[16,4,100]"], ["from 16", "training.global_batch_size 8"]),
    "head size": (["model.hidden_size=100"], ["hidden_size 100", "num_attention_heads 8", "give kv_channels"]),
    "odd head": (["model.kv_channels=33"], ["the size of a head is 33", "kv_channels"]),
    "groups of heads": (["model.num_query_groups=3"], ["num_attention_heads 8", "num_query_groups 3"]),
    "mask": (["model.mask_token_id=8000"], ["mask_token_id 8000", "vocab_size 8000", "tokenizer reserves"]),
}

# overrides, world size -> parts of the message
IMPOSSIBLE_WORLDS = {
    "ranks": ([f"{TP}=2", f"{PP}=2"], 6, ["world size 6", "2 * 2 = 4", f"change {TP} / pipeline_model_parallel_size"]),
    "data parallel": (
        ["parallel.data_parallel_size=4"],
        2,
        ["world size 2 = TP 1 * PP 1 * DP 2", "parallel.data_parallel_size is 4", "start 4 ranks or change it"],
    ),
    "ranks with context parallel": (
        [f"{TP}=2", f"{CP}=2"],
        6,
        ["world size 6", "tensor * context * pipeline", "2 * 2 * 1 = 4", "context_parallel_size"],
    ),
    "data parallel with context parallel": (
        [f"{CP}=2", "parallel.data_parallel_size=2"],
        2,
        ["world size 2 = TP 1 * CP 2 * PP 1 * DP 1", "start 4 ranks or change it"],
    ),
    "batch": ([], 3, ["training.global_batch_size 8", "1 * 3 = 3", "change one of them"]),
    "ramp-up start": (
        ["training.rampup_batch_size=[1,1,100]"],
        2,
        ["training.rampup_batch_size start 1 is not a multiple", "1 * 2 = 2"],
    ),
    "ramp-up increment": (
        ["training.rampup_batch_size=[2,1,100]"],
        2,
        ["training.rampup_batch_size increment 1 is not a multiple", "1 * 2 = 2"],
    ),
    "interleaved micro-batches": (
        [f"{PP}=2", f"{VP}=2", "training.global_batch_size=9"],
        2,
        ["training.global_batch_size 9 gives 9 micro-batches a rank", f"{PP} 2"],
    ),
    "interleaved ramp-up": (
        [f"{PP}=2", f"{VP}=2", "training.rampup_batch_size=[3,5,100]"],
        2,
        ["training.rampup_batch_size start 3 gives 3 micro-batches a rank", f"{PP} 2"],
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_whatever_the_world(case: str) -> None:
    overrides, parts = IMPOSSIBLE[case]
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("case", IMPOSSIBLE_WORLDS)
def test_impossible_on_so_many_ranks(case: str) -> None:
    overrides, world_size, parts = IMPOSSIBLE_WORLDS[case]
    with pytest.raises(ValueError, match=r"multiple|data_parallel_size") as error:
        resolve_layout(load_config(None, overrides), world_size)
    for part in parts:
        assert part in str(error.value)


def test_interleaved_ramp_up_sizes_between_start_and_end() -> None:
    """Every size that the ramp-up passes through has to suit the interleaved schedule, not only the first and last."""
    config = load_config(None, [f"{PP}=2", f"{VP}=2", "training.rampup_batch_size=[2,3,100]"])
    with pytest.raises(ValueError, match=r"multiple of parallel\.pipeline_model_parallel_size 2"):
        resolve_layout(config, 2)


def test_what_is_left_of_the_world_is_data_parallel() -> None:
    config = load_config(None, [f"{TP}=2", f"{PP}=2", f"{VP}=2", "parallel.data_parallel_size=2"])
    layout = resolve_layout(config, 8)
    assert (layout.tensor, layout.pipeline, layout.virtual, layout.data) == (2, 2, 2, 2)
    assert layout.num_microbatches == 4
    rows = dict(layout_rows(config, layout))
    assert rows["layout"] == "tensor 2, pipeline 2 x 2 chunks, data 2"
    assert rows["global batch"].startswith("8 sequences of 512 tokens = 4,096 tokens; 4 micro-batches of 1")


def test_context_parallel_ranks_are_no_data_parallel_ones() -> None:
    config = load_config(None, [f"{TP}=2", f"{CP}=2", "data.sequence_length=512"])
    layout = resolve_layout(config, 8)
    assert (layout.context, layout.data, layout.num_microbatches) == (2, 2, 4)
    rows = dict(layout_rows(config, layout))
    assert rows["layout"] == "tensor 2, pipeline 1, context 2, data 2"
    # room for a cut: 4 tokens more, to a multiple of 16 a rank
    assert rows["micro-batch"].startswith("544 tokens with padding, 272 a context-parallel rank; segments padded to")


def test_length_of_a_packed_row() -> None:
    row = ["data.sequence_length=512", f"{CP}=2", "training.micro_batch_size=2"]
    assert row_tokens(load_config(None, row[:1])) == 512
    assert row_tokens(load_config(None, [*row, "diffusion.attention_boundary=none"])) == 1024
    assert row_tokens(load_config(None, [*row, f"{TP}=2", "parallel.sequence_parallel=true"])) == 1088
    assert row_tokens(load_config(None, [*row, "diffusion.attention_boundary=document"])) is None


def test_defaults_are_a_layout() -> None:
    assert resolve_layout(RunConfig(), 1).data == 1


def test_rows_of_any_length_on_two_interleaved_stages() -> None:
    """megatron-core tells the next stage a row's length in a message of its own, which of two at a time may be taken
    for the other's."""
    fields = ["parallel.context_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    fields += ["parallel.virtual_pipeline_model_parallel_size=2", "diffusion.attention_boundary=document"]
    with pytest.raises(ConfigError, match="rows differ in length"):
        load_config(None, fields)
    load_config(None, fields[:2] + fields[3:])
