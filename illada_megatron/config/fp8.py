"""Which configurations can train in FP8: what megatron-core and Transformer Engine would refuse later, or in words of
their own (megatron-core 0.16.1 and 0.19.2, Transformer Engine 2.11.0 and 2.20.2)."""

from typing import TYPE_CHECKING

from illada_megatron.config.schema import ModelConfig, ParallelConfig, RuntimeConfig
from illada_megatron.config.schema.precision import BLOCKWISE_GATHER_MULTIPLE, RECIPE_MULTIPLES, Fp8Config

if TYPE_CHECKING:
    from illada_megatron.config.layout import RunConfig


def check_fp8(config: "RunConfig") -> None:
    """The checks of training.precision fp8 that do not need the world size. Raises ValueError with the fields, the
    numbers and the fix."""
    _check_runtime(config.runtime)
    training, length = config.training, config.data.sequence_length
    check_fp8_layout(config.fp8, config.model, config.parallel, training.micro_batch_size, length)


def check_fp8_layout(
    fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig, micro_batch_size: int, sequence_length: int
) -> None:
    """Those of them that the layout decides, for the planner's search too."""
    _check_bf16_layers(fp8, model.num_layers, parallel.pipeline_model_parallel_size)
    _check_param_gather(fp8, parallel.use_distributed_optimizer)
    _check_tokens(fp8, model.hidden_size, parallel, micro_batch_size, sequence_length)
    _check_features(fp8, model, parallel.tensor_model_parallel_size)


def _check_runtime(runtime: RuntimeConfig) -> None:
    for field, value in (("device", "cpu"), ("transformer_impl", "local")):
        if getattr(runtime, field) == value:
            raise ValueError(
                f"runtime.{field} {value} has no FP8: training.precision fp8 is Transformer Engine's, on a GPU; leave "
                f"runtime.{field} at auto, or set training.precision=bf16"
            )


def _check_bf16_layers(fp8: Fp8Config, num_layers: int, stages: int) -> None:
    first, last = fp8.bf16_layers
    text = f"fp8.num_layers_at_start_in_bf16 {first} and num_layers_at_end_in_bf16 {last}"
    if fp8.recipe == "delayed" and (first or last):
        raise ValueError(
            f"{text}: fp8.recipe delayed has no layers in bf16, for its largest values are reduced once for all layers "
            "together: set both to 0, or fp8.recipe=tensorwise"
        )
    if max(first, last) > num_layers // stages:
        raise ValueError(
            f"{text}: megatron-core takes at most the {num_layers // stages} layers of a pipeline stage "
            f"(model.num_layers {num_layers} / parallel.pipeline_model_parallel_size {stages}): lower them"
        )
    if first + last >= num_layers:
        raise ValueError(f"{text} are all of model.num_layers {num_layers}: lower them, or set training.precision=bf16")


def _check_param_gather(fp8: Fp8Config, sharded: bool) -> None:
    if not fp8.param_gather:
        return
    if not sharded:
        raise ValueError(
            "fp8.param_gather true needs parallel.use_distributed_optimizer true, whose fp32 main weights the FP8 ones "
            "are made of, found false: set it, or fp8.param_gather=false"
        )
    if fp8.recipe == "mxfp8":
        raise ValueError(
            "fp8.param_gather true with fp8.recipe mxfp8: its weights exist twice, with factors along rows and along "
            "columns, and cannot lie in megatron-core's parameter buffer: set fp8.param_gather=false"
        )


def token_multiple(fp8: Fp8Config, sequence_parallel: bool) -> int:
    """What a rank's tokens of a micro-batch have to be a multiple of, with training.precision fp8."""
    gathered = fp8.recipe == "blockwise" and sequence_parallel
    return BLOCKWISE_GATHER_MULTIPLE if gathered else RECIPE_MULTIPLES[fp8.recipe]


def _check_tokens(fp8: Fp8Config, hidden: int, parallel: ParallelConfig, micro: int, length: int) -> None:
    """The rows of all products: those of a micro-batch, or what is left of them where they are divided."""
    tp, tokens = parallel.tensor_model_parallel_size, micro * length
    text = f"training.micro_batch_size {micro} * data.sequence_length {length}"
    multiple = token_multiple(fp8, parallel.sequence_parallel)
    if parallel.sequence_parallel:
        text += f" / parallel.tensor_model_parallel_size {tp} (sequence_parallel)"
        tokens //= tp
    # with context parallelism the row is padded (layout.row_multiple)
    if tokens % multiple and parallel.context_parallel_size == 1:
        raise ValueError(
            f"{text} = {tokens} tokens of a rank, expected a multiple of {multiple} for fp8.recipe {fp8.recipe}: "
            "change one of them, or set training.precision=bf16"
        )
    if parallel.sequence_parallel and hidden % multiple:
        raise ValueError(
            f"model.hidden_size {hidden} is not a multiple of {multiple}, which fp8.recipe {fp8.recipe} gathers whole "
            "with parallel.sequence_parallel: change it, set parallel.sequence_parallel=false or another recipe"
        )


def _check_features(fp8: Fp8Config, model: ModelConfig, tp: int) -> None:
    """Widths of the layers' matrices on a tensor parallel rank."""
    multiple, heads, groups = RECIPE_MULTIPLES[fp8.recipe], model.num_attention_heads, model.num_query_groups
    widths = {
        f"model.hidden_size {model.hidden_size}": model.hidden_size,
        f"(num_attention_heads {heads} + 2 * num_query_groups {groups}) * head size {model.head_dim}": (
            (heads + 2 * groups) * model.head_dim // tp
        ),
        f"num_attention_heads {heads} * head size {model.head_dim}": heads * model.head_dim // tp,
        f"model.ffn_hidden_size {model.ffn_hidden_size}": model.ffn_hidden_size // tp,
    }
    for text, width in widths.items():
        if width % multiple:
            raise ValueError(
                f"{text} is {width} on a rank with parallel.tensor_model_parallel_size {tp}, expected a multiple of "
                f"{multiple} for fp8.recipe {fp8.recipe}: change it or the layout, or set training.precision=bf16"
            )
