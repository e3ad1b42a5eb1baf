"""What a checkpoint holds, and whether it is intact."""

import json
import math
from dataclasses import dataclass

import torch
import xxhash

from illada_megatron.checkpoint.files.integrity import FileRecord, checksum
from illada_megatron.checkpoint.files.names import EMA, WEIGHT, split_name
from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.checkpoint.tools.compare import row_blocks
from illada_megatron.checkpoint.tools.opening import OpenCheckpoint
from illada_megatron.checkpoint.tools.processes import default_processes, pool
from illada_megatron.checkpoint.tools.sources import Source
from illada_megatron.config.parameters import parameters
from illada_megatron.system.terminal import counted

_COPIES_OF_A_BLOCK = 4
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorFacts:
    """A tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    norm: float | None
    """L2; None: not asked for."""


@dataclass(frozen=True)
class Inspection:
    """A checkpoint."""

    facts: list[tuple[str, str]]
    """Rows of a table: of the checkpoint as a whole."""
    tensors: list[TensorFacts]
    """Those that were asked for, in the model's order, weights before optimizer state."""
    left_out: int
    """Of the optimizer's state."""
    damages: list[str]


def inspect_checkpoint(
    opened: OpenCheckpoint,
    norms: bool,
    verify: bool,
    memory_mb: int = 512,
    processes: int | None = None,
    optimizer: bool = True,
) -> Inspection:
    """Look into a checkpoint. norms: of the tensors listed, streaming. verify: compare the checksums of its files.
    optimizer: list its state too.

    memory_mb: of tensors that all processes together hold at a time. Raises CheckpointError, OSError.
    """
    source, info = opened.source, opened.info
    ordered = _ordered(opened)
    names = [name for name in ordered if optimizer or split_name(name).state == WEIGHT]
    count = processes or default_processes()
    block_bytes = min(_BLOCK_BYTES, memory_mb * 10**6 // (count * _COPIES_OF_A_BLOCK))
    damages, found = _missing(opened), dict.fromkeys(names)
    files = sorted(info.files.items()) if verify else []
    if files or norms:
        with pool((source, info.path, block_bytes), count) as workers:
            checked = workers.run("checksums", _check, files, [record["bytes"] for _, record in files])
            damages += [damage for damage in checked if damage is not None]
            if norms:
                sizes = [source.tensors[name].nbytes for name in names]
                found = dict(zip(names, workers.run("norms", _norm, names, sizes), strict=True))
    tensors = [
        TensorFacts(
            name,
            source.tensors[name].shape,
            str(source.tensors[name].dtype).removeprefix("torch."),
            source.tensors[name].nbytes,
            found[name],
        )
        for name in names
    ]
    return Inspection(_facts(opened, verify), tensors, len(ordered) - len(names), damages)


def _ordered(opened: OpenCheckpoint) -> list[str]:
    """Names of the tensors in the model's order; what is not the model's at the end."""
    order = {parameter.name: index for index, parameter in enumerate(parameters(opened.config.model))}

    def key(name: str) -> tuple[bool, int, str]:
        split = split_name(name)
        return split.state != WEIGHT, order.get(split.parameter, len(order)), name

    return sorted(opened.source.tensors, key=key)


def _missing(opened: OpenCheckpoint) -> list[str]:
    """What the model needs and the checkpoint lacks, or has in another shape."""
    held, lines = opened.source.tensors, []
    for parameter in parameters(opened.config.model):
        found = held.get(parameter.name)
        if found is None or found.shape != parameter.shape:
            state = "is missing" if found is None else f"has shape {found.shape}"
            lines.append(f"{opened.info.path}: {parameter.name} {state}, expected shape {parameter.shape}")
    return lines


def _facts(opened: OpenCheckpoint, verify: bool) -> list[tuple[str, str]]:
    info, parallel, tensors = opened.info, opened.config.parallel, opened.source.tensors
    of_model = [one for name, one in tensors.items() if split_name(name).state == WEIGHT]
    weights = sum(one.nbytes for one in of_model)
    elements = sum(math.prod(one.shape) for one in of_model)
    total = sum(one.nbytes for one in tensors.values())
    average = sum(one.nbytes for name, one in tensors.items() if split_name(name).state == EMA)
    virtual = parallel.model_chunks
    layout = (
        f"tensor {parallel.tensor_model_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}"
        f"{f' x {virtual} chunks' if virtual > 1 else ''}, "
        f"{f'context {parallel.context_parallel_size}, ' if parallel.context_parallel_size > 1 else ''}"
        f"data {parallel.data_parallel_size or 'any'}, "
        f"{'distributed' if parallel.use_distributed_optimizer else 'plain'} optimizer"
    )
    state = "checksums compared" if verify else "only sizes compared"
    on_disk = sum(record["bytes"] for record in info.files.values())
    rows = [
        ("checkpoint", str(info.path)),
        ("format", opened.kind),
        ("step", f"{info.step:,}"),
        *_progress(info, opened.config.data.sequence_length),
        ("parameters", f"{elements:,}"),
        ("precision", opened.config.training.precision),
        ("weights", f"{weights:,} bytes"),
        ("optimizer", f"{total - weights:,} bytes" if total > weights else "none: weights only"),
        *([("of it, EMA of the weights", f"{average:,} bytes")] if average else []),
        (
            "on disk",
            f"{on_disk:,} bytes in {counted(len(info.files), 'file')}; {state}"
            if info.files
            else "without checksums: Megatron has written them",
        ),
        ("saved under", layout),
        *_read(info),
        ("configuration", xxhash.xxh3_128_hexdigest(json.dumps(info.config, sort_keys=True).encode())),
    ]
    return rows + [(f"{name} version", version) for name, version in info.versions.items()]


def _progress(info: CheckpointInfo, sequence_length: int) -> list[tuple[str, str]]:
    """Where the run was, in its own words at the end."""
    if info.progress is None:
        return [("progress", "none: weights that runs begin with")]
    rest = dict(info.progress)
    rest.pop("step", None)
    rows = []
    if (samples := rest.pop("consumed_samples", None)) is not None:
        rows.append(("tokens", f"{samples * sequence_length:,} in {samples:,} consumed samples of {sequence_length:,}"))
    if (held_out := rest.pop("held_out", None)) is not None:
        bound = f"{held_out['bound_nats_per_token']:.4f} nats/token at step {held_out['step']:,}"
        rows.append(("held-out bound", bound))
    for name, value in rest.items():
        rows.append((name.replace("_", " "), json.dumps(value) if isinstance(value, dict) else f"{value}"))
    return rows


def _read(info: CheckpointInfo) -> list[tuple[str, str]]:
    """What the run read."""
    data = info.fingerprints.get("data") or {}
    rows = [(f"corpus {name}".rstrip(), str(found)) for name, found in (data.get("corpora") or {}).items()]
    order = data.get("order") or {}
    if order:
        rows.append(("order of samples", ", ".join(f"{name} {json.dumps(value)}" for name, value in order.items())))
    if "tokenizer" in info.fingerprints:
        rows.append(("tokenizer", f"SHA-256 {found}" if (found := info.fingerprints["tokenizer"]) else "none"))
    known = {"data", "tokenizer"}
    return rows + [(f"fingerprint of {k}", json.dumps(v)) for k, v in info.fingerprints.items() if k not in known]


def _check(shared: tuple[Source, Folder, int], task: tuple[str, FileRecord]) -> str | None:
    place, (name, record) = shared[1], task
    found = checksum(place, name, record["bytes"])
    if found == record["xxh3_128"]:
        return None
    return f"{place}/{name}: its bytes have changed: checksum {found}, expected {record['xxh3_128']}"


def _norm(shared: tuple[Source, Folder, int], name: str) -> float:
    source, _, block_bytes = shared
    squares = 0.0
    for block in row_blocks(source, name, block_bytes):
        squares += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    return math.sqrt(squares)
