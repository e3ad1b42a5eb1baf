"""A checkpoint as others than its run read it: the newest whole one, and its configuration for one stage."""

from collections.abc import Sequence
from pathlib import Path

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.store import CheckpointInfo, newest_complete
from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.schema.learning import GONE_PLATEAU_FIELDS
from illada_megatron.system.terminal import say

ONE_STAGE_LAYOUT = (
    *("parallel.pipeline_model_parallel_size=1", "parallel.virtual_pipeline_model_parallel_size=null"),
    *("parallel.pipeline_layout=even", "parallel.context_parallel_size=1"),
    *("parallel.data_parallel_size=null", "parallel.sequence_parallel=false"),
    *("parallel.tp_comm_overlap=false", "parallel.overlap_p2p_comm=null"),
)
ONE_STAGE = (*ONE_STAGE_LAYOUT, "training.micro_batch_size=1", "training.rampup_batch_size=null")


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
