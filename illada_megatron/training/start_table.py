"""The table at start: what was chosen, and what the run is."""

from collections.abc import Sequence

import torch

from illada_megatron.config import CheckpointConfig, FaultsConfig, ModelConfig, ParallelConfig, RunConfig
from illada_megatron.config.layout import layout_rows
from illada_megatron.config.learning_rate import schedule_rows
from illada_megatron.config.schema import BlendPhase, DiffusionConfig, LossConfig
from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.model.layer_specs import choose_implementation
from illada_megatron.model.transformer_config import DTYPES
from illada_megatron.ops import chosen_implementation, rms_norm, segment_attention, swiglu
from illada_megatron.runtime import Device, capabilities
from illada_megatron.system.terminal import counted
from illada_megatron.training.optimizer import optimizer_name
from illada_megatron.training.plateau import PlateauDetector
from illada_megatron.training.setup import TrainingState, count_held_parameters


def choice_rows(config: RunConfig, device: Device) -> list[tuple[str, str]]:
    """What was chosen on this device."""
    dtype = DTYPES[config.training.precision]
    implementation = choose_implementation(config.runtime, device)
    context = config.parallel.context_parallel_size
    layers = _local_rows(dtype, device, context) if implementation == "local" else _transformer_engine_rows(context)
    return [
        ("device", f"{device.name}, {config.training.precision}, {'NCCL' if device.is_cuda else 'gloo'}"),
        *_fp8_rows(config),
        ("layers", implementation),
        *layers,
        *_model_rows(config.model),
        *([("sums", "in one order each time (training.deterministic)")] if config.training.deterministic else []),
        ("optimizer", _optimizer_text(config, device)),
        ("loss", _loss_text(config.loss, dtype, device)),
        ("missing", ", ".join(part.name for part in capabilities() if part.found is None) + " (see `illada doctor`)"),
        *_problem_rows(device),
    ]


def _fp8_rows(config: RunConfig) -> list[tuple[str, str]]:
    """What of the layers is in FP8."""
    if config.training.precision != "fp8":
        return []
    first, last = config.fp8.bf16_layers
    but = f" but the first {first} and the last {last}" if first + last else ""
    weights = ", weights kept and gathered in FP8" if config.fp8.param_gather else ""
    return [("FP8", f"{config.fp8.recipe}, linear layers{but}{weights}; attention and head bf16, loss fp32")]


def _problem_rows(device: Device) -> list[tuple[str, str]]:
    """What is installed and cannot be used; what only a GPU uses is none on a CPU."""
    return [
        ("not usable", f"{part.name}: {part.problem}")
        for part in capabilities()
        if part.problem and (device.is_cuda or part.name != "CUDA kernels")
    ]


def _model_rows(model: ModelConfig) -> list[tuple[str, str]]:
    """What the model has beyond the plain one."""
    parts = ["norms of queries and keys"] if model.qk_layernorm else []
    if (scaling := model.rope_scaling) is not None:
        parts.append(f"rotary frequencies scaled as {scaling.rope_type}, factor {scaling.factor:g}")
    return [("model", "; ".join(parts))] if parts else []


def _optimizer_text(config: RunConfig, device: Device) -> str:
    settings, parts = config.optimizer, [optimizer_name(config, device.torch_device)]
    if settings.embedding_weight_decay is not None:
        parts.append(f"embedding's weight decay {settings.embedding_weight_decay:g}")
    if settings.embedding_lr_mult != 1.0:
        parts.append(f"embedding's rate x {settings.embedding_lr_mult:g}")
    if settings.ema_decay is not None:
        parts.append(f"moving average of the weights, decay {settings.ema_decay:g}")
    return "; ".join(parts)


def _loss_text(loss: LossConfig, dtype: torch.dtype, device: Device) -> str:
    name, reason = chosen_implementation(loss.implementation, device.torch_device, dtype)
    text = "fused" if name == "fused" else f"reference, in torch ({reason})"
    penalty = f", z-loss {loss.z_loss}" if loss.z_loss else ""
    return f"masked linear cross-entropy, {text}; head on masked positions only{penalty}"


def _transformer_engine_rows(context: int) -> list[tuple[str, str]]:
    ring = f", keys and values round a ring of {context} context-parallel ranks" if context > 1 else ""
    return [
        ("attention", f"Transformer Engine, packed segments{ring}"),
        ("norm", "RMSNorm (Transformer Engine)"),
        ("activation", "SwiGLU (megatron-core)"),
    ]


def _local_rows(dtype: torch.dtype, device: Device, context: int) -> list[tuple[str, str]]:
    """Which of the local layers' operators are compiled ones, and why the others are not."""
    rows = [
        ("attention", "packed segments", "torch scaled_dot_product_attention", segment_attention),
        ("norm", "RMSNorm", "torch", rms_norm),
        ("activation", "SwiGLU", "torch", swiglu),
    ]
    found = [(name, what, other, operator.missing(device.torch_device, dtype)) for name, what, other, operator in rows]
    if context > 1:
        gathered = f"the compiled operator has no keys of other ranks; {context} context-parallel ranks gather them"
        found[0] = (*found[0][:3], gathered)
    return [
        (name, f"{what}: illada kernel" if reason is None else f"{what}: {other} ({reason})")
        for name, what, other, reason in found
    ]


def start_table(state: TrainingState) -> list[tuple[str, str]]:
    """All rows of the start-up table."""
    config, corpus, diffusion = state.config, state.source.maker.corpus, state.config.diffusion
    return [
        *choice_rows(config, state.runtime.device),
        *layout_rows(config, state.runtime.layout),
        ("exchanges", _exchanges_text(config.parallel, state.runtime.device)),
        ("on rank 0", f"{count_held_parameters(state.chunks):,} parameters"),
        ("noise", _noise_text(diffusion)),
        *([] if diffusion.loss_is_bound else [("objective", _objective_text(diffusion))]),
        *_corpus_rows(corpus, config.data.phases),
        *schedule_rows(config, state.schedule.decay_start_step),
        ("plateau", _plateau_text(config, state.schedule.plateau)),
        ("checkpoints", _checkpoints_text(config.checkpoint)),
        ("faults", _faults_text(config.faults)),
    ]


def _exchanges_text(parallel: ParallelConfig, device: Device) -> str:
    """What ranks send each other while they compute."""
    gradients = "gradients in bf16, summed in fp32" if parallel.grad_reduce_in_bf16 else "gradients in fp32"
    overlapped = [
        name
        for name, overlaps in (
            ("gradients", parallel.overlap_grad_reduce),
            ("weights", parallel.overlap_param_gather),
            ("tensor parallel", parallel.tp_comm_overlap),
            ("stages", parallel.overlaps_p2p(device.is_cuda)),
        )
        if overlaps
    ]
    return f"{gradients}; overlapped: {', '.join(overlapped) or 'nothing'}"


def _noise_text(diffusion: DiffusionConfig) -> str:
    boundary = {
        "split": f"split with probability {diffusion.split_probability}",
        "truncate": f"truncated with probability {diffusion.truncate_probability}",
        "document": "documents apart",
        "none": "whole sequences",
    }[diffusion.attention_boundary]
    schedule = f"{diffusion.noise_schedule} schedule, " if diffusion.noise_schedule != "linear" else ""
    each = " per segment" if diffusion.t_per == "segment" else ""
    pairs = "complementary " if diffusion.complementary_masks else ""
    return f"{schedule}t {diffusion.t_sampling}{each}, {pairs}{diffusion.mask_sampling} masks, {boundary}"


def _objective_text(diffusion: DiffusionConfig) -> str:
    weight: str = diffusion.loss_weight
    if weight == "clipped":
        weight = f"weights clipped at {diffusion.max_loss_weight:g}"
    if not diffusion.sees_all_t:
        weight += f", t from {diffusion.t_min:g} to {diffusion.t_max:g}; no bound can be estimated from it"
    return f"{weight} (`loss` is no bound of the likelihood)"


def _corpus_rows(corpus: BlendedCorpus, phases: Sequence[BlendPhase]) -> list[tuple[str, str]]:
    """One row a corpus: its size, its share of the samples in each phase."""
    rows = []
    for number, one in enumerate(corpus.corpora):
        text = f"{one.num_tokens:,} tokens in {counted(len(one.shards), 'shard')}, {one.num_windows:,} samples an epoch"
        if len(corpus.corpora) > 1:
            shares = [f"{float(phase.shares[number]):.2%}" for phase in corpus.schedule.proportions]
            text = f"share {' -> '.join(shares)}, {text}"
        rows.append((f"corpus {one.name}".rstrip(), text))
    if phases:
        starts = ", ".join(f"{phase.from_tokens:,}" for phase in phases)
        rows.append(("blend changes", f"after {starts} tokens"))
    return rows


def _plateau_text(config: RunConfig, detector: PlateauDetector) -> str:
    then = "the decay begins" if config.schedule.decay_start == "plateau" else "it is announced"
    return (
        f"{then} where the loss would change by less than {detector.limit:g} nats/token if the tokens were doubled "
        f"(99 % sure), from {detector.min_tokens:,} tokens on"
    )


def _checkpoints_text(settings: CheckpointConfig) -> str:
    if settings.save_dir is None:
        return "none (checkpoint.save_dir is not set)"
    every = f"every {settings.interval_steps} steps" if settings.interval_steps else "at the end"
    how = "while the run goes on" if settings.asynchronous else "while the run waits"
    kept = f", the newest {settings.keep_last} are kept" if settings.keep_last else ""
    more = f" and every {settings.keep_every}th step" if settings.keep_every else ""
    return f"{settings.save_dir}, {every}, {how}{kept}{more}"


def _faults_text(faults: FaultsConfig) -> str:
    then = "the run stops" if faults.on_bad_steps == "stop" else "back to the last checkpoint"
    spikes = (
        f"spikes over {faults.spike_window_steps} steps" if faults.spike_window_steps else "spikes are not looked for"
    )
    watchdog = f"watchdog {faults.watchdog_seconds} s" if faults.watchdog_seconds else "no watchdog"
    if faults.watchdog_seconds == "auto":
        watchdog = "watchdog by the run's own step times"
    return f"{faults.max_bad_steps} bad steps in a row: {then}; {spikes}; {watchdog}"
