"""The mask predictor as a pipeline stage: embedding, bidirectional layers, head; any subset of them."""

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from illada_megatron.config import ModelConfig, RunConfig
from illada_megatron.config.layout import row_tokens
from illada_megatron.config.schema import LossConfig
from illada_megatron.model.embedding import Embedding, TokenRows
from illada_megatron.model.head import Head
from illada_megatron.model.layer_specs import block_spec, check_context, check_precision, choose_implementation
from illada_megatron.model.packing import Segments
from illada_megatron.model.rotary import scaled_frequencies
from illada_megatron.model.transformer_config import transformer_config
from illada_megatron.model.userbuffers import start_userbuffers
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss
from illada_megatron.ops.masked_rows import MaskedRows
from illada_megatron.runtime.device import Device
from illada_megatron.runtime.heap import release_free_heap
from illada_megatron.runtime.spans import span

_LARGE_VOCABULARY = 100_000


class MaskPredictor(LanguageModule):
    """p(x0_i | x_t) for the masked positions i (arXiv 2502.09992, section 2.1), one stage of it.

    Shapes: t tokens in one row (all sequences of the micro-batch, one after the other), h hidden size, v vocabulary.
    All tensors have a batch dimension of 1, which megatron-core's packed sequences ask for.

    The head multiplies **only masked positions** with the vocabulary: training needs no other logits.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        implementation: str,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(config=config)
        self.model = model
        self.vp_stage = vp_stage
        self.pre_process = pre_process
        self.post_process = post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.tie_word_embeddings
        self.layer_offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        if pre_process:
            self.embedding = Embedding(config, model)
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=model.head_dim,
            rotary_percent=1.0,
            rotary_base=model.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        if model.rope_scaling is not None:
            self.rotary_pos_emb.inv_freq.copy_(scaled_frequencies(model, model.rope_scaling))
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, implementation, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = Head(config, model, loss, tied_here=pre_process and model.tie_word_embeddings)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """The previous stage's hidden states; called by megatron-core's schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def head_weight(self) -> Tensor:
        """[v/tp, h], the embedding's own weight where they are tied."""
        return self.shared_embedding_or_output_weight() if self.model.tie_word_embeddings else self.output_layer.weight

    def forward(
        self,
        tokens: Tensor | None,
        packed_seq_params: Segments,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        grad_scale: float | None = None,
        masked: MaskedRows | None = None,
        token_rows: TokenRows | None = None,
    ) -> Tensor | MaskedLoss:
        """A stage's work on one micro-batch.

        tokens: [1, t] int64 (first stage), None elsewhere; labels [t] int64 and loss_weight [t] float32 (last stage).
        grad_scale: the gradient that backward will bring for loss_sum. Where it is known and megatron-core's DDP keeps
        a main_grad for the head, the head's gradient is added to it in the forward pass.
        masked, token_rows: where masks and other tokens are, of the last and the first stage, as a loader finds them on
        a CPU. Without them a GPU makes the host wait while they are looked for.
        Returns the masked loss where labels are given, else hidden states [t (/ tp with sequence parallelism), 1, h];
        on the last stage these are the normalised ones that `logits` takes.
        """
        main_grad = self._head_main_grad() if grad_scale is not None else None
        short_of_memory = self._logits_fill_memory(labels)
        if short_of_memory:
            release_free_heap()
        embedded = None
        if self.pre_process:
            tied_here = self.model.tie_word_embeddings and self.post_process
            with span("embedding"):
                embedded = self.embedding(tokens, main_grad is not None or not tied_here, token_rows)
        # Frequencies as long as the longest segment, never the whole row: megatron-core takes a table as long as the
        # row for absolute positions, and positions have to restart in each segment.
        with span("layers"):
            hidden = self.decoder(
                hidden_states=embedded,
                attention_mask=None,
                rotary_pos_emb=self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True),
                packed_seq_params=packed_seq_params,
            )
        if labels is None or loss_weight is None or not self.post_process:
            return hidden
        if short_of_memory:
            release_free_heap()
        with span("head and masked loss"):
            return self.output_layer(hidden, self.head_weight(), labels, loss_weight, main_grad, grad_scale, masked)

    def _logits_fill_memory(self, labels: Tensor | None) -> bool:
        """On a CPU memory is at its highest when a chunk of logits joins the layers' activations. To give free memory
        back before either is made saves 230 of 2,900 MB of a 0.1B model with 155,136 tokens, for 1 % of its step at
        most."""
        large = self.model.padded_vocab_size >= _LARGE_VOCABULARY
        return large and labels is not None and labels.device.type == "cpu" and torch.is_grad_enabled()

    def _head_main_grad(self) -> Tensor | None:
        """Where DDP sums the head's gradient; None: there is no such place, or no gradient is wanted."""
        if not (self.post_process and torch.is_grad_enabled()):
            return None
        return getattr(self.head_weight(), "main_grad", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last stage's hidden states [t (/tp), 1, h] -> logits [t, vocab_size] of all positions, for generation."""
        return self.output_layer(hidden, self.head_weight())


def build_model_chunks(config: RunConfig, device: Device) -> list[MaskPredictor]:
    """This rank's part of the model: one chunk, or `virtual_pipeline_model_parallel_size` of them.

    The weights are not filled yet (`fill_initial_weights`, or a checkpoint). Raises ConfigError where the device has
    not what the configuration asks for.
    """
    from megatron.core import parallel_state

    check_precision(config, device)
    implementation = choose_implementation(config.runtime, device)
    check_context(config, implementation)
    core = transformer_config(config, device, implementation)
    if core.tp_comm_overlap:
        tokens = row_tokens(config)
        assert tokens is not None, "check_config has refused rows of any length"
        start_userbuffers(core, implementation, tokens // config.parallel.context_parallel_size)
    virtual = core.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunks.append(
            MaskPredictor(
                core,
                config.model,
                implementation,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
                loss=config.loss,
            ).to(device.torch_device)
        )
    return chunks


def count_parameters(config: RunConfig) -> int:
    """Parameters of the whole model, counted on the meta device (no memory); needs a runtime of one rank."""
    core = transformer_config(config, Device(torch.device("cpu"), "meta", None), "local")
    core.use_cpu_initialization = True  # megatron-core then lets the default device decide
    with torch.device("meta"):
        model = MaskPredictor(core, config.model, "local")
    return sum(parameter.numel() for parameter in model.parameters())
