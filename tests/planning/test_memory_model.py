"""Memory as it is planned against what megatron-core allocates for the same rank, whatever the number of ranks: torch's
fake process group stands for the others, and the stages, gradient buffers and optimizers are the real ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from illada_megatron.config import ModelConfig, RunConfig, load_config
from illada_megatron.config.layout import pipeline_split
from illada_megatron.ops import segment_attention
from illada_megatron.planning import Candidate, load_device, stage_layers, workload
from illada_megatron.planning.memory import (
    gradients,
    layer_bytes,
    layers_in_flight,
    optimizer,
    weights,
)
from illada_megatron.planning.workload import stage_elements
from illada_megatron.runtime import cpu_adaptor
from illada_megatron.runtime.device import Device, select_device
from illada_megatron.runtime.megatron import import_megatron
from illada_megatron.runtime.process_groups import own_groups

H100 = load_device("h100")
SMALL = (
    *("model.num_layers=8", "model.hidden_size=64", "model.ffn_hidden_size=192", "model.num_attention_heads=8"),
    *("model.num_query_groups=4", "model.vocab_size=1000", "data.sequence_length=64", "model.max_sequence_length=64"),
    *("training.micro_batch_size=1", "training.global_batch_size=64", "runtime.device=cpu"),
)
WIDE = (
    *SMALL,
    *("model.hidden_size=512", "model.ffn_hidden_size=1408", "data.sequence_length=128"),
    "model.max_sequence_length=128",
)
MIDDLE = (*WIDE, "model.vocab_size=32000")
# tensor, pipeline, virtual, data
LAYOUTS = [(1, 1, 1, 1), (1, 1, 1, 8), (2, 1, 1, 4), (1, 4, 1, 2), (2, 2, 2, 4), (4, 2, 4, 32), (4, 8, 1, 64)]


def configured(base: Iterable[str], layout: tuple[int, int, int, int], *more: str) -> RunConfig:
    tensor, pipeline, virtual, _ = layout
    parallel = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else "null",
        "sequence_parallel": str(tensor > 1).lower(),
    }
    return load_config("tiny", [*base, *(f"parallel.{name}={value}" for name, value in parallel.items()), *more])


def candidate_of(config: RunConfig, layout: tuple[int, int, int, int]) -> Candidate:
    tensor, pipeline, virtual, data = layout
    split = stage_layers(pipeline_split(config))
    return Candidate(
        tensor * pipeline * data, tensor, pipeline, virtual, 1, 1, "none", config.training.precision, split
    )


@contextmanager
def rank_of(config: RunConfig, world: int, rank: int) -> Iterator[None]:
    """This process as one rank of `world`; collectives leave their results as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import_megatron()
    cpu_adaptor.install()
    from megatron.core import parallel_state, tensor_parallel

    parallel = config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with own_groups():  # as a run does; else 1,024 ranks have thousands
            parallel_state.initialize_model_parallel(
                parallel.tensor_model_parallel_size,
                parallel.pipeline_model_parallel_size,
                parallel.virtual_pipeline_model_parallel_size,
                create_gloo_process_groups=False,
            )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def rank_of_stage(layout: tuple[int, int, int, int], stage: int) -> int:
    """The last rank of a stage: pipeline ranks lie furthest apart."""
    tensor, _, _, data = layout
    return (stage + 1) * tensor * data - 1


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each once."""
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())


def optimizer_tensors(built: Any) -> Iterator[Tensor]:
    """Main weights that are no model's weights, and moments."""
    for one in getattr(built, "chained_optimizers", [built]):
        for group in one.optimizer.param_groups:
            yield from group["params"]
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def built_bytes(config: RunConfig, world: int, rank: int) -> dict[str, int]:
    """What a rank has allocated after a step."""
    with rank_of(config, world, rank):
        from illada_megatron.model import build_model_chunks
        from illada_megatron.training.gradient_reduction import wrap_data_parallel
        from illada_megatron.training.optimizer import apply_gradients, build_optimizer

        chunks = wrap_data_parallel(config.parallel, build_model_chunks(config, select_device(config)))
        built = build_optimizer(config, chunks)
        built.prepare_grads()
        apply_gradients(built, 1.0, 1.0)  # Adam's moments exist from the first step on
        parameters = [one for chunk in chunks for one in chunk.parameters()]
        held = allocated(parameters)
        return {
            "weights": held,
            "gradients": allocated(one.main_grad for one in parameters),
            "optimizer": allocated([*parameters, *optimizer_tensors(built)]) - held,
        }


def compare(config: RunConfig, layout: tuple[int, int, int, int]) -> None:
    work, one = workload(config), candidate_of(config, layout)
    for stage in sorted({0, layout[1] // 2, layout[1] - 1}):
        found = built_bytes(config, one.gpus, rank_of_stage(layout, stage))
        wanted = {
            "weights": weights(work, one, stage, H100).value,
            "gradients": gradients(work, one, stage).value,
            "optimizer": optimizer(work, one, stage).value,
        }
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=0.05), (name, stage, layout)
        assert sum(found.values()) == pytest.approx(sum(wanted.values()), rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer(layout: tuple[int, int, int, int]) -> None:
    compare(configured(MIDDLE, layout, "training.precision=bf16"), layout)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ((2, 2, 1, 2), ("training.precision=fp32",)),
        ((1, 2, 1, 2), ("training.precision=bf16", "parallel.use_distributed_optimizer=false")),
        ((2, 2, 2, 2), ("training.precision=bf16", "model.tie_word_embeddings=false")),
        ((2, 1, 1, 2), ("training.precision=bf16", "model.add_qkv_bias=true", "model.qk_layernorm=true")),
    ],
)
def test_small_and_otherwise(layout: tuple[int, int, int, int], more: tuple[str, ...]) -> None:
    compare(configured(SMALL, layout, *more), layout)


def kept_bytes(config: RunConfig, layout: tuple[int, int, int, int]) -> int:
    """What a forward pass keeps for the backward pass of the only stage, but its weights."""
    kept: list[Tensor] = []
    with rank_of(config, layout[0] * layout[3], 0):
        from illada_megatron.model import build_model_chunks, pack

        (model,) = build_model_chunks(config, select_device(config))
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        owned = {one.untyped_storage()._cdata for one in model.parameters()}
        length = config.data.sequence_length
        lengths = [0, length // 3, length]
        segments = pack(torch.tensor(lengths, dtype=torch.int32), max(b - a for a, b in pairwise(lengths)))
        tokens = torch.randint(0, 900, (1, length))

        def note(saved: Tensor) -> Tensor:
            if saved.untyped_storage()._cdata not in owned:
                kept.append(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            output = model(tokens, segments, labels=tokens[0], loss_weight=torch.ones(length))
        assert output.loss_sum.requires_grad
        return allocated(kept)


def kept_of_a_layer(layout: tuple[int, int, int, int], *more: str) -> tuple[float, ModelConfig]:
    """(bytes a token that a layer of a real forward pass keeps: four layers less two; the model)."""
    four, two = (configured(WIDE, layout, *more, f"model.num_layers={count}") for count in (4, 2))
    kept = (kept_bytes(four, layout) - kept_bytes(two, layout)) / 2
    return kept / four.data.sequence_length, four.model


def local_bytes(model: ModelConfig, tensor: int) -> float:
    """As it is planned for Transformer Engine, but for what local layers make again: the norms' results and the last
    projection's input, in bf16."""
    return layer_bytes(model, tensor, "bf16") - 2 * (2 * model.hidden_size + model.ffn_hidden_size) / tensor


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tensor", [1, 4])
def test_activations_of_a_layer(tensor: int, precision: str) -> None:
    """Sequence parallel with several ranks."""
    if precision == "bf16" and (reason := segment_attention.missing(torch.device("cpu"), torch.bfloat16)) is not None:
        pytest.skip(f"attention keeps more without its compiled operator: {reason}")
    found, model = kept_of_a_layer((tensor, 1, 1, 1), f"training.precision={precision}")
    wanted = local_bytes(model, tensor)
    if precision == "fp32":  # but for the norms' and attention's statistics, which always are
        wanted = 2 * wanted - 4 * (2 + model.num_attention_heads) / tensor
    assert found == pytest.approx(wanted, rel=0.02)


def test_activations_of_a_layer_that_is_made_again() -> None:
    """In full; local layers know no selective recomputation."""
    found, model = kept_of_a_layer((1, 1, 1, 1), "training.precision=bf16", "training.recompute=full")
    assert found == pytest.approx(layer_bytes(model, 1, "bf16", "full"), rel=0.02)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "microbatches"), [(4, 1, 8), (4, 1, 2), (4, 2, 8), (2, 4, 4), (8, 2, 8)]
)
def test_passes_in_flight_are_the_schedules(pipeline: int, virtual: int, microbatches: int) -> None:
    """megatron-core's own count of forward passes before the first backward pass, and its order of chunks."""
    layout = (1, pipeline, virtual, 1)
    config = configured(
        SMALL, layout, f"model.num_layers={pipeline * virtual}", f"training.global_batch_size={microbatches}"
    )
    one = candidate_of(config, layout)
    for stage in range(pipeline):
        with rank_of(config, pipeline, rank_of_stage(layout, stage)):
            from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

            total, all_first, warmup, _ = get_pp_rank_microbatches(
                microbatches, virtual, pipeline if virtual > 1 else None, forward_only=False
            )
        expected = total if all_first else min(warmup + 1, total)
        assert layers_in_flight(one, stage, microbatches, one.split[stage]) == expected


@pytest.mark.parametrize(
    ("preset", "layout", "whole"),
    [
        ("illada-8b", (1, 1, 1, 8), 7_615_025_152),
        ("illada-8b", (4, 2, 1, 128), 7_615_025_152),
        ("illada-70b", (8, 4, 5, 32), None),
        ("llada-8b", (2, 2, 1, 4), None),
    ],
)
def test_presets_on_the_meta_device(preset: str, layout: tuple[int, int, int, int], whole: int | None) -> None:
    """Parameters of every stage, and the shards of a real distributed optimizer of the first and the last."""
    tensor, pipeline, virtual, _ = layout
    config = load_config(
        preset,
        [
            f"parallel.tensor_model_parallel_size={tensor}",
            f"parallel.pipeline_model_parallel_size={pipeline}",
            f"parallel.virtual_pipeline_model_parallel_size={virtual if virtual > 1 else 'null'}",
            f"parallel.sequence_parallel={str(tensor > 1).lower()}",
        ],
    )
    work, one = workload(config), candidate_of(config, layout)
    if whole is not None:
        assert work.model.num_parameters == whole
    for stage in sorted({0, pipeline // 2, pipeline - 1}):
        with rank_of(config, one.gpus, rank_of_stage(layout, stage)):
            held, shard = on_meta(config)
        assert held == stage_elements(work, one, stage).total
        assert 12 * shard == pytest.approx(optimizer(work, one, stage).value, rel=0.05)


def on_meta(config: RunConfig) -> tuple[int, int]:
    """(parameters of this rank, fp32 main weights of its optimizer)."""
    from illada_megatron.model import mask_predictor
    from illada_megatron.training.gradient_reduction import wrap_data_parallel
    from illada_megatron.training.optimizer import build_optimizer

    meta = torch.device("meta")
    plain = mask_predictor.transformer_config

    def without_memory(*arguments: Any) -> Any:
        core = plain(*arguments)
        core.use_cpu_initialization = True  # the default device decides
        return core

    plain_type = torch.Tensor.type

    def cuda_type(self: Tensor, *arguments: Any, **named: Any) -> Any:
        """megatron-core recognises parameters by this name."""
        return plain_type(self, *arguments, **named) if arguments or named else "torch.cuda.BFloat16Tensor"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_predictor, "transformer_config", without_memory)
        with meta:
            models = mask_predictor.build_model_chunks(config, Device(meta, "meta", None))
        held = sum(parameter.numel() for model in models for parameter in model.parameters())
        patch.setattr(torch.cuda, "current_device", lambda: meta)
        patch.setattr(torch.Tensor, "type", cuda_type)
        built = build_optimizer(config, wrap_data_parallel(config.parallel, models))
        optimizers = getattr(built, "chained_optimizers", [built])
        groups = [group for one in optimizers for group in one.optimizer.param_groups]
        return held, sum(parameter.numel() for group in groups for parameter in group["params"])
