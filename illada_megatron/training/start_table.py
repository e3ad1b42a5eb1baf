"""The table at start: what was chosen, and what the run is."""

from collections.abc import Sequence

import torch

from illada_megatron.config import CheckpointConfig, FaultsConfig, RunConfig
from illada_megatron.config.layout import layout_rows
from illada_megatron.config.schema import BlendPhase, LossConfig
from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.model.layer_specs import choose_implementation
from illada_megatron.model.transformer_config import DTYPES
from illada_megatron.ops import chosen_implementation, rms_norm, segment_attention, swiglu
from illada_megatron.runtime import Device, capabilities
from illada_megatron.training.optimizer import optimizer_name
from illada_megatron.training.setup import TrainingState, count_held_parameters

_TRANSFORMER_ENGINE = [
    ("attention", "Transformer Engine, packed segments"),
    ("norm", "RMSNorm (Transformer Engine)"),
    ("activation", "SwiGLU (megatron-core)"),
]


def choice_rows(config: RunConfig, device: Device) -> list[tuple[str, str]]:
    """What was chosen on this device."""
    dtype = DTYPES[config.training.precision]
    implementation = choose_implementation(config.runtime, device)
    layers = _local_rows(dtype, device) if implementation == "local" else _TRANSFORMER_ENGINE
    return [
        ("device", f"{device.name}, {config.training.precision}, {'NCCL' if device.is_cuda else 'gloo'}"),
        ("layers", implementation),
        *layers,
        ("optimizer", optimizer_name(config.parallel)),
        ("loss", _loss_text(config.loss, dtype, device)),
        ("missing", ", ".join(part.name for part in capabilities() if part.found is None) + " (see `illada doctor`)"),
        *_problem_rows(device),
    ]


def _problem_rows(device: Device) -> list[tuple[str, str]]:
    """What is installed and cannot be used; what only a GPU uses is none on a CPU."""
    return [
        ("not usable", f"{part.name}: {part.problem}")
        for part in capabilities()
        if part.problem and (device.is_cuda or part.name != "CUDA kernels")
    ]


def _loss_text(loss: LossConfig, dtype: torch.dtype, device: Device) -> str:
    name, reason = chosen_implementation(loss.implementation, device.torch_device, dtype)
    text = "fused" if name == "fused" else f"reference, in torch ({reason})"
    penalty = f", z-loss {loss.z_loss}" if loss.z_loss else ""
    return f"masked linear cross-entropy, {text}; head on masked positions only{penalty}"


def _local_rows(dtype: torch.dtype, device: Device) -> list[tuple[str, str]]:
    """Which of the local layers' operators are compiled ones, and why the others are not."""
    rows = [
        ("attention", "packed segments", "torch scaled_dot_product_attention", segment_attention),
        ("norm", "RMSNorm", "torch", rms_norm),
        ("activation", "SwiGLU", "torch", swiglu),
    ]
    found = [(name, what, other, operator.missing(device.torch_device, dtype)) for name, what, other, operator in rows]
    return [
        (name, f"{what}: illada kernel" if reason is None else f"{what}: {other} ({reason})")
        for name, what, other, reason in found
    ]


def start_table(state: TrainingState) -> list[tuple[str, str]]:
    """All rows of the start-up table."""
    config, corpus = state.config, state.source.maker.corpus
    diffusion = config.diffusion
    boundary = {
        "split": f"split with probability {diffusion.split_probability}",
        "truncate": f"truncated with probability {diffusion.truncate_probability}",
        "document": "documents apart",
        "none": "whole sequences",
    }[diffusion.attention_boundary]
    return [
        *choice_rows(config, state.runtime.device),
        *layout_rows(config, state.runtime.layout),
        ("on rank 0", f"{count_held_parameters(state.chunks):,} parameters"),
        ("noise", f"t {diffusion.t_sampling}, {diffusion.mask_sampling} masks, {boundary}"),
        *_corpus_rows(corpus, config.data.phases),
        ("checkpoints", _checkpoints_text(config.checkpoint)),
        ("faults", _faults_text(config.faults)),
    ]


def _corpus_rows(corpus: BlendedCorpus, phases: Sequence[BlendPhase]) -> list[tuple[str, str]]:
    """One row a corpus: its size, its share of the samples in each phase."""
    rows = []
    for number, one in enumerate(corpus.corpora):
        text = f"{one.num_tokens:,} tokens in {len(one.shards):,} shards, {one.num_windows:,} samples an epoch"
        if len(corpus.corpora) > 1:
            shares = [f"{float(phase.shares[number]):.2%}" for phase in corpus.schedule.proportions]
            text = f"share {' -> '.join(shares)}, {text}"
        rows.append((f"corpus {one.name}".rstrip(), text))
    if phases:
        starts = ", ".join(f"{phase.from_tokens:,}" for phase in phases)
        rows.append(("blend changes", f"after {starts} tokens"))
    return rows


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
