"""Checkpoints of random numbers, without a model or a run."""

import math
from pathlib import Path

import torch
from torch import Tensor

from illada_megatron.checkpoint import store
from illada_megatron.checkpoint.files.names import EMA, FP8, MOMENTS, tensor_name
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.files.tensors import TensorWriter, write_metadata
from illada_megatron.config import RunConfig
from illada_megatron.config.parameters import parameters

STEP = 7
PROGRESS = {
    "step": STEP,
    "consumed_samples": 28,
    "schedule": {"decay_start": 0.8, "decay_start_step": 5, "plateau": None},
    "optimizer_step": 6,
}


def random_tensors(config: RunConfig, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a checkpoint of `config`: weights, moments, fp32 main weights (of a bf16 model), the weights'
    moving average (where the run keeps one) and delayed scaling's state (where it scales so)."""
    generator = torch.Generator().manual_seed(seed)
    bf16 = config.training.precision != "fp32"
    moments = torch.bfloat16 if config.optimizer.moments_dtype == "bf16" else torch.float32
    tensors = {}
    for parameter in parameters(config.model):
        main = torch.randn(parameter.shape, generator=generator)
        tensors[parameter.name] = main.bfloat16() if bf16 else main
        average = [EMA] if config.optimizer.ema_decay else []
        for state in (*MOMENTS, *(["main"] if bf16 else []), *average):
            value = main if state == "main" else torch.randn(parameter.shape, generator=generator)
            tensors[tensor_name(parameter.name, state)] = value.to(moments) if state in MOMENTS else value
        if config.training.precision == "fp8" and config.fp8.recipe == "delayed" and ".linear_" in parameter.name:
            layer, history = parameter.name.removesuffix(".weight"), config.fp8.amax_history_len
            for direction, count in (("fwd", 3), ("bwd", 2)):
                for state, shape in (("scale", (count,)), ("amax_history", (history, count))):
                    name = tensor_name(layer, f"{FP8}{state}_{direction}")
                    tensors[name] = torch.rand(shape, generator=generator)
    return tensors


def write_checkpoint(
    save_dir: Path | str, config: RunConfig, tensors: dict[str, Tensor], step: int = STEP, writers: int = 3
) -> Path:
    """Write `tensors` in uneven pieces, dealt out to the files of several writers. Returns the checkpoint's path.

    save_dir: a directory, or an `s3://` prefix.
    """
    place = store.step_directory(folder(save_dir), step)
    place.make()
    files = [TensorWriter(place, rank, piece_bytes=1 << 22) for rank in range(writers)]
    for number, (name, tensor) in enumerate(tensors.items()):
        cut = math.ceil(len(tensor) / 3)
        for piece, (low, high) in enumerate(((0, cut), (cut, len(tensor)))):
            offset = (low, *(0 for _ in tensor.shape[1:]))
            files[(number + piece) % writers].write(name, tensor[low:high], offset, tensor.shape)
    records = write_metadata(place, [file.close() for file in files])
    progress = {**PROGRESS, "step": step}
    store.finish(place, step, config.model_dump(mode="json"), progress, records, {"tokenizer": None})
    store.move_pointer(place)
    return Path(str(place))
