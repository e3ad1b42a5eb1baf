"""The mask predictor and how it is divided among ranks."""

from typing import Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from illada_megatron.config.schema.base import Recompute, Section


class ModelConfig(Section):
    """The mask predictor (ILLaDA: a Llama block without the causal mask, no dropout, no time input)."""

    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 256
    ffn_hidden_size: PositiveInt = 704
    num_attention_heads: PositiveInt = 8
    num_query_groups: PositiveInt = 2
    """KV heads. Equal to num_attention_heads: multi-head attention; fewer: grouped-query attention."""
    kv_channels: PositiveInt | None = None
    """Size of a head; None: hidden_size / num_attention_heads."""
    add_qkv_bias: bool = False
    """Biases at the query, key and value projections, as Qwen2 has them; nothing else has one."""
    vocab_size: PositiveInt = 8000
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding has vocab_size rounded up to this multiple. The padded size does not depend on the layout,
    padded rows never enter the loss."""
    mask_token_id: NonNegativeInt = 5
    exclude_mask_logit: bool = False
    """The mask's logit is minus infinity, in training and generation: no probability is learned for what is never
    right."""
    max_sequence_length: PositiveInt = 8192
    """Longest sequence the model is meant for (exported as max_position_embeddings)."""
    tie_word_embeddings: bool = True
    rotary_base: PositiveFloat = 500000.0
    norm_epsilon: PositiveFloat = 1e-5
    logit_softcap: NonNegativeFloat = 0.0
    """Logits become s tanh(logit / s), in training and generation; 0: they stay as they are."""
    init_method_std: PositiveFloat = 0.02
    """Linear weights N(0, std); o_proj and down_proj N(0, std / sqrt(2 * num_layers))."""
    embedding_init_std: PositiveFloat | None = None
    """None: sqrt(1 / (2 * hidden_size)), as in the released iLLaDA code."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def excluded_id(self) -> int | None:
        """The token that takes no part in the softmax."""
        return self.mask_token_id if self.exclude_mask_logit else None

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @property
    def num_parameters(self) -> int:
        """Parameters of the model as built, padded vocabulary rows included."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        if self.add_qkv_bias:
            attention += d * (self.num_attention_heads + 2 * self.num_query_groups)
        layer = attention + 3 * h * self.ffn_hidden_size + 2 * h
        embeddings = self.padded_vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + h + embeddings

    @validator(mode="after")
    def _check(self) -> Self:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "change one of them, or give kv_channels"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}: change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"the size of a head is {self.head_dim}; rotary embeddings need an even one: kv_channels")
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is not below vocab_size {self.vocab_size}: "
                "give the id that the tokenizer reserves for the mask"
            )
        return self


class LayoutChoice(Section):
    """A layout that the run may take, whole: a field that is left out has the value written here."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt | None = None
    """None: training.micro_batch_size."""
    recompute: Recompute | None = None
    """None: training.recompute. Fewer ranks hold larger parts of the optimizer's state."""


class ParallelConfig(Section):
    """The layout. data_parallel_size is what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks on a pipeline rank (interleaved 1F1B); None or 1: not interleaved."""
    data_parallel_size: PositiveInt | None = None
    """None: world size / (TP * PP). A number is checked against the world."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: PositiveInt | None = None
    """Overlapped gradients and weights are exchanged in buckets of this many parameters or more, on the first pipeline
    stage; elsewhere as a whole. None: megatron-core's max(40 million, 1 million * data-parallel ranks)."""
    layouts: list[LayoutChoice] = []
    """Layouts that the run may take, in order of preference: at each start the first that fits the number of ranks
    replaces the fields above, with the global batch unchanged. Empty: only the fields above."""
