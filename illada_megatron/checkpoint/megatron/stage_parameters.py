"""Which parameters a pipeline stage holds, under which names and in which order, without building a model."""

from dataclasses import dataclass
from typing import Literal

from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, FINAL_NORM, HEAD, Parameter, parameters
from illada_megatron.config.pipeline_split import Split, first_layers

Implementation = Literal["local", "transformer_engine"]

# In the order of megatron-core's modules (attention makes linear_proj first), which is that of named_parameters() and
# so of the optimizer's parameters. The bias and the norms of queries and keys only where the model has them
# (add_qkv_bias, qk_layernorm).
_LAYER_NAMES: dict[Implementation, dict[str, str]] = {
    "local": {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias": "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight": "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight": "self_attention.k_layernorm.weight",
        "pre_mlp_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
    },
    # a norm belongs to the linear layer behind it
    "transformer_engine": {
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias": "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight": "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight": "self_attention.k_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
    },
}


@dataclass(frozen=True)
class HeldParameter:
    """A parameter as a stage has it."""

    local_name: str
    """Layers are counted from 0 in each chunk."""
    parameter: Parameter
    """Of the whole model."""
    is_tied_head: bool = False
    """The last stage's copy of the embedding."""

    def is_shared(self, model: ModelConfig, pipeline: int) -> bool:
        """Whether first and last stage both have it, and add up its gradient."""
        return model.tie_word_embeddings and pipeline > 1 and self.parameter.name == EMBEDDING


def chunks_of_stages(
    model: ModelConfig, split: Split, implementation: Implementation = "local"
) -> list[list[list[HeldParameter]]]:
    """[pipeline rank][model chunk] -> its parameters, in the order of megatron-core's GPTModel.

    split: the numbers of their layers (config.layout.pipeline_split).
    """
    by_name = {parameter.name: parameter for parameter in parameters(model)}
    first_layer, last = first_layers(split), (len(split) - 1, len(split[0]) - 1)
    stages: list[list[list[HeldParameter]]] = []
    for rank, counts in enumerate(split):
        chunks = []
        for chunk, count in enumerate(counts):
            first = first_layer[rank][chunk]
            is_first, is_last = rank == chunk == 0, (rank, chunk) == last
            held = [HeldParameter(EMBEDDING, by_name[EMBEDDING])] if is_first else []
            for index in range(count):
                held += [
                    HeldParameter(f"decoder.layers.{index}.{local}", by_name[f"decoder.layers.{first + index}.{name}"])
                    for local, name in _LAYER_NAMES[implementation].items()
                    if f"decoder.layers.{first + index}.{name}" in by_name
                ]
            if is_last:
                held.append(HeldParameter(FINAL_NORM, by_name[FINAL_NORM]))
                if not model.tie_word_embeddings:
                    held.append(HeldParameter(HEAD, by_name[HEAD]))
                elif not is_first:
                    held.append(HeldParameter(HEAD, by_name[EMBEDDING], is_tied_head=True))
            chunks.append(held)
        stages.append(chunks)
    return stages


def parameters_of_stages(model: ModelConfig, split: Split) -> list[list[Parameter]]:
    """[pipeline rank] -> the parameters that it holds first or alone, all chunks of it; together each once."""
    return [
        [held.parameter for chunk in chunks for held in chunk if not held.is_tied_head]
        for chunks in chunks_of_stages(model, split)
    ]
