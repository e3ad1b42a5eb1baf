"""Where a run writes: everything below one folder, `run_dir`, unless a field says otherwise.

runs/my/
  start_0001.yaml     the resolved configuration of each start, and what started it
  steps.jsonl         logging.jsonl_path
  tensorboard/        logging.tensorboard_dir
  checkpoints/        checkpoint.save_dir
  traces/             stacks and collectives of a rank that made no progress; what training.profile records
  wandb/              Weights & Biases' own files, with logging.wandb_project
"""

from collections.abc import Mapping
from typing import Any

from illada_megatron.config.schema import LoggingConfig

PLACES = {
    ("checkpoint", "save_dir"): "checkpoints",
    ("logging", "tensorboard_dir"): "tensorboard",
    ("logging", "jsonl_path"): "steps.jsonl",
}
"""Field -> where in run_dir it lies, unless it is given."""


def with_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration with those of `PLACES` that are not given, where there is a run_dir."""
    run_dir = values.get("run_dir")
    if not isinstance(run_dir, str):
        return dict(values)
    filled = {**values, "run_dir": run_dir.rstrip("/") or run_dir}
    for (section, field), place in PLACES.items():
        given = filled.get(section, {})
        if isinstance(given, Mapping) and field not in given:
            filled[section] = {**given, field: f"{filled['run_dir']}/{place}"}
    return filled


def check_places(run_dir: str | None, logging: LoggingConfig) -> None:
    """Raises ValueError with the field, the value and the fix."""
    if run_dir is not None and (not run_dir.strip("/") or "://" in run_dir):
        raise ValueError(
            f"run_dir {run_dir!r}: expected a folder of a file system, as runs/my; checkpoints alone may lie "
            "elsewhere, as checkpoint.save_dir=s3://bucket/prefix"
        )
    if logging.wandb_project is not None and run_dir is None:
        raise ValueError(
            f"logging.wandb_project {logging.wandb_project} needs run_dir, found null: the run's id at Weights & "
            "Biases is kept there"
        )
