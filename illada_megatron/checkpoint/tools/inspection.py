"""What a checkpoint holds, and whether it is intact."""

import json
import math
from dataclasses import dataclass

import torch
import xxhash

from illada_megatron.checkpoint.files.integrity import FileRecord, checksum
from illada_megatron.checkpoint.files.names import EMA, WEIGHT, split_name
from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.tools.compare import row_blocks
from illada_megatron.checkpoint.tools.opening import OpenCheckpoint
from illada_megatron.checkpoint.tools.processes import default_processes, pool
from illada_megatron.checkpoint.tools.sources import Source
from illada_megatron.config.parameters import parameters

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
    """In the model's order, weights before optimizer state."""
    damages: list[str]


def inspect_checkpoint(
    opened: OpenCheckpoint, norms: bool, verify: bool, memory_mb: int = 512, processes: int | None = None
) -> Inspection:
    """Look into a checkpoint. norms: of all tensors, streaming. verify: compare the checksums of its files.

    memory_mb: of tensors that all processes together hold at a time. Raises CheckpointError, OSError.
    """
    source, info = opened.source, opened.info
    names = _ordered(opened)
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
    return Inspection(_facts(opened, tensors, verify), tensors, damages)


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


def _facts(opened: OpenCheckpoint, tensors: list[TensorFacts], verify: bool) -> list[tuple[str, str]]:
    info, parallel = opened.info, opened.config.parallel
    weights = sum(one.nbytes for one in tensors if split_name(one.name).state == WEIGHT)
    elements = sum(math.prod(one.shape) for one in tensors if split_name(one.name).state == WEIGHT)
    total = sum(one.nbytes for one in tensors)
    average = sum(one.nbytes for one in tensors if split_name(one.name).state == EMA)
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    layout = (
        f"tensor {parallel.tensor_model_parallel_size}, pipeline {parallel.pipeline_model_parallel_size}"
        f"{f' x {virtual} chunks' if virtual > 1 else ''}, data {parallel.data_parallel_size or 'any'}, "
        f"{'distributed' if parallel.use_distributed_optimizer else 'plain'} optimizer"
    )
    files = f"{len(info.files):,}, {sum(record['bytes'] for record in info.files.values()):,} bytes"
    state = "checksums compared" if verify else "only sizes compared"
    rows = [
        ("checkpoint", str(info.path)),
        ("format", opened.kind),
        ("step", f"{info.step:,}"),
        ("saved under", layout),
        ("precision", opened.config.training.precision),
        ("parameters", f"{elements:,}"),
        ("weights", f"{weights:,} bytes"),
        ("optimizer", f"{total - weights:,} bytes" if total > weights else "none: weights only"),
        *([("of it, EMA of the weights", f"{average:,} bytes")] if average else []),
        ("files", f"{files}; {state}" if info.files else "without checksums: Megatron has written them"),
        ("configuration", xxhash.xxh3_128_hexdigest(json.dumps(info.config, sort_keys=True).encode())),
    ]
    for name, value in (info.progress or {}).items():
        if name != "step":
            rows.append((name.replace("_", " "), json.dumps(value) if isinstance(value, dict) else f"{value}"))
    rows += [(f"fingerprint of {name}", json.dumps(value)) for name, value in info.fingerprints.items()]
    rows += [(f"{name} version", version) for name, version in info.versions.items()]
    return rows


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
