"""A checkpoint as a function from tokens to logits, for generation and scoring."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.store import CheckpointInfo, newest_complete
from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.schema.learning import GONE_PLATEAU_FIELDS
from illada_megatron.runtime import runtime, world_size_from_environment
from illada_megatron.system.terminal import say

ONE_STAGE_LAYOUT = (
    *("parallel.pipeline_model_parallel_size=1", "parallel.virtual_pipeline_model_parallel_size=null"),
    *("parallel.pipeline_layout=even", "parallel.context_parallel_size=1"),
    *("parallel.data_parallel_size=null", "parallel.sequence_parallel=false"),
    *("parallel.tp_comm_overlap=false", "parallel.overlap_p2p_comm=null"),
)
ONE_STAGE = (*ONE_STAGE_LAYOUT, "training.micro_batch_size=1", "training.rampup_batch_size=null")

Predict = Callable[[Tensor], Tensor]


def saved_config(info: CheckpointInfo, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration a checkpoint was saved with, `section.field=value` overrides on top. Raises ConfigError.

    A run in FP8 has left weights in bf16, and so they are used: on any device, and with sequences of any length.
    """
    stored, schedule = dict(info.config), info.config.get("schedule")
    if isinstance(schedule, dict):  # a rule that is gone refuses to train by its fields; here nobody trains
        stored["schedule"] = {key: value for key, value in schedule.items() if key not in GONE_PLATEAU_FIELDS}
    training = info.config.get("training")
    if isinstance(training, dict) and training.get("precision") == "fp8":
        stored["training"] = {**training, "precision": "bf16"}
        stored["fp8"] = {**info.config.get("fp8", {}), "param_gather": False}
    return load_config(stored, overrides, source=str(info.path))


def find_checkpoint(path: str | Path) -> CheckpointInfo:
    """The newest complete checkpoint below `path`; says on stderr which newer ones were refused. Raises
    CheckpointError where there is none."""
    info, refused = newest_complete(path)
    if info is None:
        raise CheckpointError(f"{path}: holds no checkpoint")
    for reason in refused:
        say(f"refused {reason}", error=True)
    return info


@contextmanager
def open_predictor(path: str | Path, device: str = "auto", ema: bool = False) -> Iterator[tuple[Predict, RunConfig]]:
    """Yield (predict, configuration) for the newest complete checkpoint below `path`, whatever layout saved it.

    ema: with the moving average of its weights.
    predict: tokens [b, s] int64 on the CPU -> logits [b, s, vocab_size] on the model's device. All ranks of the world
    share each layer (tensor parallel) and call it together.
    """
    info = find_checkpoint(path)
    config = saved_config(
        info,
        [
            *ONE_STAGE,
            f"parallel.tensor_model_parallel_size={world_size_from_environment()}",
            f"runtime.device={device}",
        ],
    )
    with runtime(config) as run:
        from illada_megatron.checkpoint.sharded import load_weights  # megatron-core is ready to be imported
        from illada_megatron.model import build_model_chunks, equal_segments

        (model,) = build_model_chunks(config, run.device)
        load_weights(info, config, [model], ema)
        model.eval()

        @torch.no_grad()
        def predict(tokens: Tensor) -> Tensor:
            batch, length = tokens.shape
            on_device = tokens.to(run.device.torch_device)
            hidden = model(on_device.view(1, -1), equal_segments(batch, length, run.device.torch_device))
            return model.logits(hidden).view(batch, length, -1)

        yield predict, config
