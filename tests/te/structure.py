"""Stages of the mask predictor, made of Transformer Engine's layers and of the local ones, as any rank of a large run
would make them: on the meta device, with torch's fake process group. A process of its own, which prints JSON.

    python -m tests.te.structure

Where Transformer Engine is installed it is the real one, of which everything is loaded; else the wheel's Python over
`benchmarks/fp8/stand_in.py`.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.fp8 import stand_in

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
_CONTEXT = "parallel.context_parallel_size=2"
# preset -> its layout, ranks: the first, one in the middle and the last (illada-8b: all), tensor parallel ones fastest
LAYOUTS: dict[str, tuple[list[str], list[int]]] = {
    "illada-8b": (["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"], [*range(8)]),
    "illada-8b-32k": (
        ["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2", _CONTEXT],
        [0, 6, 15],
    ),
    "illada-70b": ([], [0, 13, 31]),
}
LOCAL, BF16 = "local", "bf16"


def main() -> None:
    real = stand_in.is_installed()
    if real:
        import transformer_engine.pytorch

        stand_in.tell_of_an_h100()
    else:
        stand_in.install()
    from illada_megatron.runtime import cpu_adaptor
    from illada_megatron.runtime.megatron import import_megatron

    import_megatron()
    cpu_adaptor.install()
    from megatron.core.extensions import transformer_engine as layers

    found = {preset: dict(_ranks(preset)) for preset in LAYOUTS}
    import megatron.core
    import transformer_engine

    versions = {
        "transformer_engine": transformer_engine.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
    }
    json.dump({"real": real, "have_te": layers.HAVE_TE, "versions": versions, "presets": found}, sys.stdout)


def _ranks(preset: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """By rank: by kind of layers: what `_stage` says."""
    from megatron.core import parallel_state

    from illada_megatron.config import load_config
    from illada_megatron.config.layout import resolve_layout
    from illada_megatron.runtime.distributed import _init_megatron

    overrides, ranks = LAYOUTS[preset]
    for rank in ranks:
        base = load_config(preset, overrides)
        parallel = base.parallel
        model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        ranks_in_all = model_ranks * parallel.context_parallel_size
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks_in_all)
        from illada_megatron.runtime.device import Device

        _init_megatron(base, resolve_layout(base, ranks_in_all), Device(torch.device("cpu"), "meta", None))
        torch.cuda.current_device = lambda: "meta"  # type: ignore[assignment,return-value]
        kinds = {}
        for kind in (LOCAL, BF16, *RECIPES):
            gathers = kind not in (LOCAL, BF16, "mxfp8")
            fp8 = [] if kind in (LOCAL, BF16) else ["training.precision=fp8", f"fp8.recipe={kind}"]
            if gathers:
                fp8.append("fp8.param_gather=true")
            kinds[kind] = _stage(load_config(preset, [*overrides, *fp8]), kind)
        yield str(rank), kinds
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _stage(config: Any, kind: str) -> dict[str, Any]:
    """Of a rank's chunks: parameters by canonical name, [shape, shape of the whole, offset in it]; how many elements no
    other rank counts; which layers compute in FP8; modules of the first layer."""
    from illada_megatron.checkpoint.state import held_parameters

    chunks = _chunks(config, "local" if kind == LOCAL else "transformer_engine")
    held = held_parameters(chunks, config.model)
    return {
        "parameters": {item.parameter.name: list(item.tensor.shape) for item in held},
        "sharding": dict(_sharding(chunks, config)),
        "counted": sum(item.tensor.numel() for item in held if item.first_copy),
        "fp8_layers": [one for chunk in chunks for one in _fp8_layers(chunk)],
        "attention": sorted(
            {str(layer.self_attention.attn_mask_type) for one in chunks for layer in one.decoder.layers}
        ),
        "devices": sorted({one.device.type for chunk in chunks for one in chunk.parameters()}),
    }


def _chunks(config: Any, implementation: str) -> list[Any]:
    from megatron.core import parallel_state

    from illada_megatron.model.mask_predictor import MaskPredictor
    from illada_megatron.model.transformer_config import transformer_config
    from illada_megatron.runtime.device import Device

    core = transformer_config(config, Device(torch.device("cpu"), "meta", None), implementation)
    core.init_model_with_meta_device = True
    virtual = core.virtual_pipeline_model_parallel_size
    chunks = []
    with torch.device("meta"):
        for stage in range(virtual or 1):
            vp_stage = stage if virtual else None
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
            chunks.append(MaskPredictor(core, config.model, implementation, first, last, vp_stage))
    return chunks


def _sharding(chunks: list[Any], config: Any) -> Iterator[tuple[str, Any]]:
    """megatron-core's own description of each layer's tensors: where this rank's part lies in the whole."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from illada_megatron.config.parameters import canonical_name

    for chunk in chunks:
        for number, layer in enumerate(chunk.decoder.layers):
            for key, item in layer.sharded_state_dict(prefix="").items():
                name = canonical_name(f"decoder.layers.{number}.{key}", chunk.layer_offset, True)
                if isinstance(item, ShardedTensorFactory):
                    parts = item.build()
                    yield name, [_place(one) for one in (parts if isinstance(parts, list) else [*parts.values()])]
                elif isinstance(item, ShardedTensor):
                    yield name, [_place(item)]


def _place(item: Any) -> list[list[int]]:
    return [list(item.local_shape), list(item.global_shape), list(item.global_offset)]


def _fp8_layers(chunk: Any) -> list[int]:
    """Numbers, from 0 on, of the whole model's layers that megatron-core gives an FP8 context."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    return [one for one in numbers if chunk.config.fp8 and not is_first_last_bf16_layer(chunk.config, one)]


if __name__ == "__main__":
    main()
