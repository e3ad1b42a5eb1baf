"""A checkpoint, or a Hugging Face directory, as a model in memory, on one rank or divided over several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.predictor import ONE_STAGE, find_checkpoint, saved_config
from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.runtime import Runtime, runtime, world_size_from_environment

if TYPE_CHECKING:
    from illada_megatron.model import MaskPredictor


@dataclass(frozen=True)
class OpenedStage:
    """This rank's part of a trained model, in memory."""

    stage: "MaskPredictor"
    config: RunConfig
    run: Runtime
    source: str
    """Where the weights are from."""


@contextmanager
def open_stage(
    path: str | Path, device: str = "auto", ema: bool = False, pipeline: int = 1, overrides: Sequence[str] = ()
) -> Iterator[OpenedStage]:
    """The newest complete checkpoint below `path`, whatever layout saved it, or the Hugging Face directory `path`.

    ema: with the moving average of its weights. All ranks of the world take part: `pipeline` stages, whose layers the
    ranks of a stage share. overrides: `section.field=value`. Raises ConfigError, CheckpointError, DataError.
    """
    world = world_size_from_environment()
    if pipeline < 1 or world % pipeline:
        raise ConfigError(f"{pipeline} pipeline stages do not divide {world} ranks: start a multiple of them (--nproc)")
    layout = [
        *ONE_STAGE,
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"parallel.tensor_model_parallel_size={world // pipeline}",
        f"runtime.device={device}",
        "runtime.transformer_impl=local",  # Transformer Engine's attention keeps no keys of ours
        *overrides,
    ]
    if is_hugging_face(path):
        from illada_megatron.checkpoint.hugging_face.importing import open_source

        if ema:
            raise CheckpointError(f"{path}: a Hugging Face directory has no moving average of its weights")
        source = open_source(Path(path))
        config = load_config(source.config.model_dump(mode="json"), layout, source=str(path))
        with runtime(config) as run:
            from illada_megatron.checkpoint.hugging_face.loading import load_source
            from illada_megatron.model import build_model_chunks

            (stage,) = build_model_chunks(config, run.device)
            load_source(source, [stage])
            yield OpenedStage(stage, config, run, str(path))
        return
    info = find_checkpoint(path)
    config = saved_config(info, layout)
    with runtime(config) as run:
        from illada_megatron.checkpoint.sharded import load_weights  # megatron-core is ready to be imported
        from illada_megatron.model import build_model_chunks

        (stage,) = build_model_chunks(config, run.device)
        load_weights(info, config, [stage], ema)
        yield OpenedStage(stage, config, run, str(info.path))


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` is a directory with a config.json and safetensors."""
    place = Path(path)
    return (place / "config.json").is_file() and any(place.glob("*.safetensors"))
