"""What cannot train in FP8 is refused before anything starts: the field, the numbers, and what to change."""

import pytest

from illada_megatron.config import ConfigError, load_config
from illada_megatron.config.layout import row_multiple, row_tokens

FP8 = "training.precision=fp8"
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
SP = "parallel.sequence_parallel=true"

# overrides of the defaults (4 layers of 256, 8 heads, 2 groups, ffn 704, 512 tokens) -> parts of the message
IMPOSSIBLE = {
    "on a CPU": (["runtime.device=cpu"], ["runtime.device cpu has no FP8", "set training.precision=bf16"]),
    "in local layers": (
        ["runtime.transformer_impl=local"],
        ["runtime.transformer_impl local has no FP8", "leave runtime.transformer_impl at auto"],
    ),
    "delayed with layers in bf16": (
        ["fp8.recipe=delayed", "fp8.num_layers_at_start_in_bf16=1"],
        ["num_layers_at_start_in_bf16 1 and num_layers_at_end_in_bf16 0", "set both to 0, or fp8.recipe=tensorwise"],
    ),
    "more layers in bf16 than a stage has": (
        [f"{PP}=4", "fp8.num_layers_at_start_in_bf16=2"],
        ["at most the 1 layers of a pipeline stage", "model.num_layers 4", f"{PP} 4", "lower them"],
    ),
    "no layer left": (
        ["fp8.num_layers_at_start_in_bf16=2", "fp8.num_layers_at_end_in_bf16=2"],
        ["are all of model.num_layers 4", "or set training.precision=bf16"],
    ),
    "gathered without shards": (
        ["fp8.param_gather=true", "parallel.use_distributed_optimizer=false"],
        ["fp8.param_gather true needs parallel.use_distributed_optimizer true", "or fp8.param_gather=false"],
    ),
    "gathered as mxfp8": (
        ["fp8.param_gather=true", "fp8.recipe=mxfp8"],
        ["fp8.param_gather true with fp8.recipe mxfp8", "set fp8.param_gather=false"],
    ),
    "tokens": (
        ["data.sequence_length=504"],
        ["micro_batch_size 1 * data.sequence_length 504 = 504 tokens", "a multiple of 16 for fp8.recipe tensorwise"],
    ),
    "tokens of mxfp8": (["data.sequence_length=496", "fp8.recipe=mxfp8"], ["= 496 tokens", "a multiple of 32"]),
    "tokens of a tensor parallel rank": (
        [f"{TP}=2", SP, "data.sequence_length=496"],
        [f"496 / {TP} 2 (sequence_parallel) = 248 tokens of a rank", "a multiple of 16"],
    ),
    "blocks of a tensor parallel rank": (
        [f"{TP}=2", SP, "fp8.recipe=blockwise", "data.sequence_length=384"],
        ["= 192 tokens of a rank", "a multiple of 128 for fp8.recipe blockwise"],
    ),
    "hidden size in blocks": (
        [f"{TP}=2", SP, "fp8.recipe=blockwise", "model.hidden_size=320"],
        ["model.hidden_size 320 is not a multiple of 128", "set parallel.sequence_parallel=false or another recipe"],
    ),
    "hidden size": (["model.hidden_size=264", "model.kv_channels=32"], ["model.hidden_size 264 is 264 on a rank"]),
    "feed-forward": (
        [f"{TP}=2", "model.ffn_hidden_size=720"],
        ["model.ffn_hidden_size 720 is 360 on a rank", f"{TP} 2"],
    ),
    "heads": (
        ["model.num_attention_heads=2", "model.num_query_groups=2", f"{TP}=2", "model.kv_channels=24"],
        ["(num_attention_heads 2 + 2 * num_query_groups 2) * head size 24 is 72 on a rank"],
    ),
    "both kinds of buckets together": (
        ["fp8.param_gather=true", "parallel.grad_reduce_in_bf16=true", "parallel.overlap_grad_reduce=true"],
        ["grad_reduce_in_bf16, overlap_grad_reduce and fp8.param_gather are all true"],
    ),
    "userbuffers without a kind for its blocks": (
        [f"{TP}=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true", "fp8.recipe=blockwise"],
        ["Transformer Engine has no such buffers for fp8.recipe blockwise"],
    ),
    "one of several layouts": (
        ["parallel.layouts=[{tensor_model_parallel_size: 2}]", "model.ffn_hidden_size=720"],
        ["parallel.layouts[0]: model.ffn_hidden_size 720 is 360"],
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_fp8_is_refused(case: str) -> None:
    overrides, parts = IMPOSSIBLE[case]
    with pytest.raises(ConfigError) as error:
        load_config(None, [FP8, *overrides])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("case", [case for case in IMPOSSIBLE if case != "no layer left"])
def test_the_same_is_possible_in_bf16(case: str) -> None:
    """The section fp8 says nothing to a run without it: switching back takes one field."""
    load_config(None, ["training.precision=bf16", *IMPOSSIBLE[case][0]])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize("preset", ["illada-8b", "illada-70b", "llada-8b"])
def test_presets_train_in_fp8(preset: str, recipe: str) -> None:
    config = load_config(preset, [FP8, f"fp8.recipe={recipe}"])
    assert config.fp8.bf16_layers == ((1, 1) if recipe == "tensorwise" else (0, 0))


def test_counts_of_layers_in_bf16_may_differ() -> None:
    fields = ["fp8.num_layers_at_start_in_bf16=0", "fp8.num_layers_at_end_in_bf16=2"]
    assert load_config(None, [FP8, *fields]).fp8.bf16_layers == (0, 2)


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)])
def test_rows_that_context_parallel_ranks_share_are_padded_for_the_products(recipe: str, multiple: int) -> None:
    fields = ["data.sequence_length=1000", "parallel.context_parallel_size=2", f"{TP}=2", f"fp8.recipe={recipe}"]
    config = load_config("illada-8b", [FP8, "parallel.sequence_parallel=true", *fields])
    assert row_multiple(config) == multiple * 2 * 2
    tokens = row_tokens(config)
    assert tokens is not None
    assert tokens % (multiple * 2 * 2) == 0
