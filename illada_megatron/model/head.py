"""The head: hidden states of the last layer -> the masked loss, or logits."""

from copy import copy

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, tanh

from illada_megatron.config import ModelConfig
from illada_megatron.config.schema import LossConfig
from illada_megatron.model.main_grad import InMainGrad
from illada_megatron.ops.masked_linear_cross_entropy import MaskedLoss, masked_linear_cross_entropy
from illada_megatron.ops.masked_rows import MaskedRows


class Head(tensor_parallel.ColumnParallelLinear):
    """Called as a module, for the loss too: DDP's hooks wait for weights that are still being gathered.

    tied_here: this stage has the embedding too and the head's weight is the embedding's, which has waited for it.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, loss: LossConfig, tied_here: bool) -> None:
        own = copy(config)  # the loss adds to main_grad without Apex, which megatron-core's layer would ask for
        own.gradient_accumulation_fusion = False
        super().__init__(
            config.hidden_size,
            model.padded_vocab_size,
            config=own,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=tied_here,
        )
        self.model = model
        self.loss = loss
        self.tied_here = tied_here

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        main_grad: Tensor | None = None,
        grad_scale: float | None = None,
        masked: MaskedRows | None = None,
    ) -> Tensor | MaskedLoss:
        """hidden [t (/ tp with sequence parallelism), 1, h], weight [v/tp, h] -> the masked loss where labels [t] and
        loss_weight [t] are given, else the logits [t, vocab_size] of all positions.

        main_grad: where the weight's gradient is added in the forward pass, as that of `grad_scale` times the loss.
        masked: the rows that count; None: they are looked for.
        """
        if labels is None or loss_weight is None:
            return self._logits(hidden, weight)
        megabytes = self.loss.chunk_memory_mb
        return masked_linear_cross_entropy(
            hidden.squeeze(1),
            # where they are tied here, the embedding's backward pass comes last and hands over
            weight if main_grad is None else InMainGrad.apply(weight, not self.tied_here),
            labels,
            loss_weight,
            vocab_size=self.model.vocab_size,
            tp_group=self.tp_group,
            sequence_parallel=self.config.sequence_parallel,
            implementation=self.loss.implementation,
            chunk_memory_bytes=None if megabytes is None else megabytes * 10**6,
            z_loss=self.loss.z_loss,
            logit_softcap=self.model.logit_softcap,
            excluded_id=self.model.excluded_id,
            main_grad=main_grad,
            grad_scale=grad_scale if main_grad is not None else None,
            masked=masked,
        )

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        parallel_logits, _ = super().forward(hidden, weight)
        gathered = tensor_parallel.gather_from_tensor_model_parallel_region(parallel_logits, group=self.tp_group)
        logits = gathered.squeeze(1)[:, : self.model.vocab_size]
        cap = self.model.logit_softcap
        logits = logits if cap == 0 else cap * tanh(logits / cap)
        excluded = self.model.excluded_id
        if excluded is None:
            return logits
        return logits.index_fill(1, torch.tensor(excluded, device=logits.device), -torch.inf)
