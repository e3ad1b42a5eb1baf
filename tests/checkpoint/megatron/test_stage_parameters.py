"""Names, order and places of parameters, against the models and buffers that megatron-core itself makes."""

import math

import pytest
import torch

from illada_megatron.checkpoint.megatron.legacy_layout import positions_in_buffer
from illada_megatron.checkpoint.megatron.stage_parameters import chunks_of_stages, parameters_of_stages
from illada_megatron.config import RunConfig
from illada_megatron.config.parameters import parameters
from illada_megatron.runtime import Runtime


@pytest.mark.parametrize("more", [{}, {"add_qkv_bias": True, "qk_layernorm": True}], ids=["plain", "biases, norms"])
def test_names_and_order_are_gpt_models(more: dict[str, bool], tiny_config: RunConfig, single_process: Runtime) -> None:
    """A name or a place in the order that differs would put moments to other parameters in Megatron."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from illada_megatron.model.transformer_config import transformer_config

    model = tiny_config.model.model_copy(update=more)
    core = transformer_config(tiny_config.model_copy(update={"model": model}), single_process.device, "local")
    core.use_te_activation_func = False
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_layernorm)
    gpt = GPTModel(
        core,
        spec,
        model.padded_vocab_size,
        64,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    ((held,),) = chunks_of_stages(model, [[model.num_layers]], "local")
    assert [(one.local_name, one.parameter.shape) for one in held] == [
        (name, tuple(parameter.shape)) for name, parameter in gpt.named_parameters()
    ]


@pytest.mark.parametrize("split", [[[4]], [[2], [2]], [[1, 1], [1, 1]], [[1, 1, 1, 1]], [[3], [1]]], ids=str)
def test_stages_hold_each_parameter_once(split: list[list[int]], tiny_config: RunConfig) -> None:
    model = tiny_config.model.model_copy(update={"num_layers": 4})
    names = [one.name for stage in parameters_of_stages(model, split) for one in stage]
    assert sorted(names) == sorted(one.name for one in parameters(model))


@pytest.mark.parametrize(("bucket_size", "shared"), [(None, False), (None, True), (3000, False), (3000, True)])
def test_buffer_positions_are_megatron_cores(
    bucket_size: int | None, shared: bool, tiny_config: RunConfig, single_process: Runtime
) -> None:
    """Sizes that are no multiples of 64, buckets, and the embedding that two stages share."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from illada_megatron.model.transformer_config import transformer_config

    shapes = [(100, 10), (33,), (70, 9), (64,), (41, 50), (7,), (30, 40)]
    own = [shared and index in (0, 6) for index in range(len(shapes))]
    module = torch.nn.Module()
    for index, (shape, is_own) in enumerate(zip(shapes, own, strict=True)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.shared_embedding = is_own  # type: ignore[attr-defined]
        module.register_parameter(f"p{index}", parameter)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    core = transformer_config(tiny_config, single_process.device, "local")
    (made,) = DistributedDataParallel(core, config, module).buffers
    positions, length = positions_in_buffer([math.prod(shape) for shape in shapes], own, bucket_size)
    assert length == made.numel_unpadded
    world, before = {}, 0  # what is saved leaves out the padding between the buckets
    for bucket, (start, _) in zip(made.buckets, made.bucket_indices, strict=True):
        for parameter in bucket.params:
            world[parameter] = before + made.param_index_map[parameter][0] - start
        before += bucket.numel_unpadded
    assert positions == [world[parameter] for parameter in module.parameters()]
