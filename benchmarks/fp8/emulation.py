"""A run of this package whose layers are Transformer Engine's, in FP8, on a CPU: `stand_in.install()` comes first, then
this module's import.

Attention, which stays bf16 in any case, is torch's within each segment. All else that runs is the code of a GPU's run:
this package's, megatron-core's, and Transformer Engine's modules, quantisers and bookkeeping of factors.
"""

import inspect
import textwrap
from itertools import pairwise
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
import torch.nn.functional as F
import transformer_engine.pytorch.module.base as te_base
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.extensions import transformer_engine as te_layers
from torch import Tensor

from illada_megatron.config import RunConfig, load_config
from illada_megatron.model import mask_predictor
from illada_megatron.runtime import cpu_adaptor
from illada_megatron.training import start_table


def emulated_config(config: str | None, overrides: list[str]) -> RunConfig:
    """What `load_config` gives, on a CPU, which it refuses with FP8."""
    loaded = load_config(config, overrides)
    return loaded.model_copy(update={"runtime": loaded.runtime.model_copy(update={"device": "cpu"})})


def install() -> None:
    """From now on models of this process are made of Transformer Engine's layers."""
    assert te_layers.HAVE_TE, "megatron-core did not find Transformer Engine"
    for module in (mask_predictor, start_table):
        module.choose_implementation = lambda *_: "transformer_engine"  # type: ignore[attr-defined]
    mask_predictor.check_precision = lambda *_: None
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True  # Transformer Engine's Adam is a kernel, too
    te_layers.TEDotProductAttention.forward = _attention
    _take_cpu_tensors()
    _name_types()
    # of one rank's weights, in place; gloo would not take FP8 and bf16 ones together
    param_and_grad_buffer.dist_all_gather_func = lambda *_, **__: None


def _attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> Tensor:
    """query [t, np, d], key and value [t, ng, d] -> [t, np * d]: each position sees its segment."""
    segments = given["packed_seq_params"]
    out, scale = [], self.config.softmax_scale
    for start, end in pairwise(segments.cu_seqlens_q.tolist()):
        heads = (one[start:end].transpose(0, 1) for one in (query, key, value))
        out.append(F.scaled_dot_product_attention(*heads, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out).reshape(len(query), -1)


def _name_types() -> None:
    """The CPU adaptor puts torch.cuda before a type; before that of a quantised tensor, which asks its base, twice."""
    cpu_adaptor.install()
    adapted = torch.Tensor.type

    def once(self: Tensor, *arguments: Any, **options: Any) -> Any:
        found = adapted(self, *arguments, **options)
        return found.replace("torch.cuda.cuda.", "torch.cuda.") if isinstance(found, str) else found

    setattr(torch.Tensor, "type", once)  # noqa: B010 (a method to mypy)


def _take_cpu_tensors() -> None:
    """Transformer Engine's modules assert that their input is on a GPU, in the middle of what has to run."""
    method = te_base.TransformerEngineBaseModule.prepare_forward
    source, asserted = textwrap.dedent(inspect.getsource(method)), 'assert inp.is_cuda, "TransformerEngine needs CUDA."'
    assert asserted in source, "another Transformer Engine: its prepare_forward does not assert what it did"
    names: dict[str, Any] = {}
    exec(source.replace(asserted, "pass"), vars(te_base), names)
    te_base.TransformerEngineBaseModule.prepare_forward = names["prepare_forward"]
