"""The mask predictor and how it is divided among ranks."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from illada_megatron.config.schema.base import Recompute, Section


class RopeScaling(Section):
    """Rotary frequencies of a model that reads more positions than it was first trained on; names as in Hugging Face's
    config.json. Fields of other types than `rope_type` stay out.

    Hugging Face's "dynamic" is not here: its frequencies follow the longest sequence of a batch, so that a sequence's
    loss would depend on which others it lies with. What it does at one length, `rotary_base` times factor^(d / (d - 2))
    of a head of size d does (NTK-aware scaling)."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """linear: positions over `factor` (arXiv 2306.15595); llama3: only long wavelengths (arXiv 2407.21783); yarn: by
    turns within the original length, and sharper attention (arXiv 2309.00071)."""
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    original_max_position_embeddings: PositiveInt | None = None
    """llama3, yarn: the length before."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above original / low_freq_factor are stretched by `factor`..."""
    high_freq_factor: PositiveFloat | None = None
    """...those below original / high_freq_factor stay, and those between are interpolated."""
    beta_fast: PositiveFloat | None = None
    """yarn: what turns this often within the original length stays; None: 32..."""
    beta_slow: PositiveFloat | None = None
    """...and what turns less than this is stretched by `factor`; None: 1."""
    attention_factor: PositiveFloat | None = None
    """yarn: queries and keys are multiplied by it; None: 0.1 ln(factor) + 1."""

    @validator(mode="after")
    def _check(self) -> Self:
        needed, allowed = {
            "linear": ((), ()),
            "llama3": (("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
            "yarn": (("original_max_position_embeddings",), ("beta_fast", "beta_slow", "attention_factor")),
        }[self.rope_type]
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"rope_type {self.rope_type} needs {', '.join(missing)}")
        if more := sorted(given - {"rope_type", "factor", *needed, *allowed}):
            raise ValueError(f"rope_type {self.rope_type} has no {', '.join(more)}: leave it out")
        if (self.low_freq_factor or 0.0) >= (self.high_freq_factor or math.inf):
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )
        if (self.beta_slow or 1.0) >= (self.beta_fast or 32.0):
            raise ValueError(f"beta_slow {self.beta_slow or 1.0} is not below beta_fast {self.beta_fast or 32.0}")
        return self


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
    qk_layernorm: bool = False
    """RMSNorm of each query and key head before it is turned by its position, with one weight for all query heads of a
    layer and one for all key heads (Megatron's name; arXiv 2302.05442; as Qwen3 has it)."""
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
    rope_scaling: RopeScaling | None = None
    """None: the frequencies of rotary_base as they are."""
    norm_epsilon: PositiveFloat = 1e-5
    logit_softcap: NonNegativeFloat = 0.0
    """Logits become s tanh(logit / s), in training and generation; 0: they stay as they are."""
    init_method: Literal["normal", "mitchell"] = "normal"
    """mitchell: OLMo's of that name (`olmo/model.py`, reset_parameters): normal, cut off at 3 standard deviations;
    these are 1 / sqrt(hidden_size), of o_proj and down_proj of layer l, from 0 on, 1 / sqrt(2 (l + 1) input size).
    normal: as the next two say."""
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
        if self.qk_layernorm:
            attention += 2 * d
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
        if self.init_method == "mitchell" and self.embedding_init_std is not None:
            raise ValueError("init_method mitchell has a standard deviation of its own: leave out embedding_init_std")
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "yarn":
            longest = scaling.factor * (scaling.original_max_position_embeddings or 0)
            if self.max_sequence_length > longest:
                raise ValueError(
                    f"max_sequence_length {self.max_sequence_length} is beyond rope_scaling's factor "
                    f"{scaling.factor:g} * original_max_position_embeddings "
                    f"{scaling.original_max_position_embeddings}: raise the factor"
                )
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
    pipeline_layout: str = "even"
    context_parallel_size: PositiveInt = 1
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
    pipeline_layout: str = "even"
    """Layers of each stage. even: the same number; auto: by what they cost, the head and the embedding among them
    (docs/pipeline_balance.md); else as Megatron's --pipeline-model-parallel-layout writes them: "Ettt|tttt|tttL"."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence's tokens: for long sequences (docs/long_sequences.md). They hold the same weights
    and divide the optimizer's state, as data-parallel ranks do."""
    data_parallel_size: PositiveInt | None = None
    """None: world size / (TP * CP * PP). A number is checked against the world."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: PositiveInt | None = None
    """Overlapped gradients and weights are exchanged in buckets of this many parameters or more, on the first pipeline
    stage; elsewhere as a whole. None: megatron-core's max(40 million, 1 million * data-parallel ranks)."""
    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    """Make a bucket's size a multiple of 2^16 parameters: NCCL's rings are faster so with many ranks."""
    ddp_average_in_collective: bool = False
    """NCCL divides the gradients by the data-parallel ranks on the way, which saves a pass over them."""
    grad_reduce_in_bf16: bool = False
    """Gradients travel between data-parallel ranks in bf16, half of the bytes, and are added in fp32
    (docs/training.md). They are summed over micro-batches in fp32 in any case."""
    tp_comm_overlap: bool = False
    """Sequence parallel exchanges run beside the products that need them, through Transformer Engine's userbuffers."""
    overlap_p2p_comm: bool | None = None
    """Interleaved stages exchange while they compute. None: where stages are interleaved, on GPUs (gloo sends and
    receives on the cores that compute)."""
    layouts: list[LayoutChoice] = []
    """Layouts that the run may take, in order of preference: at each start the first that fits the number of ranks
    replaces the fields above, with the global batch unchanged. Empty: only the fields above."""

    @property
    def model_chunks(self) -> int:
        """Of a pipeline rank; several are interleaved."""
        return self.virtual_pipeline_model_parallel_size or 1

    def overlaps_p2p(self, on_gpu: bool) -> bool:
        """overlap_p2p_comm, chosen."""
        return self.model_chunks > 1 and on_gpu if self.overlap_p2p_comm is None else self.overlap_p2p_comm
