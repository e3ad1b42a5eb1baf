"""The yardstick: the matrix products of a training step and nothing else, into buffers that exist already."""

import torch

from benchmarks.measuring.arithmetic import DTYPES
from benchmarks.measuring.products import AttentionProducts, LinearProducts
from benchmarks.step.step_batches import count_work, global_batch, masked_rows
from illada_megatron.config import RunConfig
from illada_megatron.runtime import Runtime


class BareGemms:
    """The products of a step over the global batch: as many rows meet the vocabulary as are masked in it."""

    def __init__(self, config: RunConfig, run: Runtime) -> None:
        batches = global_batch(config, run)
        self.work = count_work(config, batches)
        self._masked = [masked_rows(batch) for batch in batches]
        self._device = run.device
        model, layers = config.model, config.model.num_layers
        hidden, dim, heads = model.hidden_size, model.head_dim, model.num_attention_heads
        size, length = config.training.micro_batch_size, config.data.sequence_length
        like = torch.empty(0, dtype=DTYPES[config.training.precision], device=run.device.torch_device)
        qkv = dim * (heads + 2 * model.num_query_groups)
        widths = [(hidden, qkv), (heads * dim, hidden), (hidden, 2 * model.ffn_hidden_size)]
        widths.append((model.ffn_hidden_size, hidden))
        self._layers = range(layers)
        self._linears = [LinearProducts(layers, size * length, *width, like) for width in widths]
        self._attention = AttentionProducts(size * heads, length, dim, like)
        self._head = LinearProducts(1, max(self._masked), hidden, model.vocab_size, like)

    def step(self) -> None:
        """All products of a step; returns when the device is done."""
        for masked in self._masked:
            for layer in self._layers:
                self._attention.forward()
                for linear in self._linears:
                    linear.forward(layer)
            self._head.forward(rows=masked)
            self._head.backward(rows=masked)
            for layer in reversed(self._layers):
                for linear in reversed(self._linears):
                    linear.backward(layer)
                self._attention.backward()
        if self._device.is_cuda:
            torch.cuda.synchronize()
