"""The run's configuration: a typed schema, YAML presets and files, dotted overrides; one validated `RunConfig` out.

In: a preset or file, and overrides.
Out: a `RunConfig`, or a ConfigError that names the field.
Never imported here: anything else of the package but `system`, torch.
"""

from illada_megatron.config.layout import RunConfig
from illada_megatron.config.load import ConfigError, load_config, preset_names, save_config
from illada_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    FaultsConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "FaultsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "ValidationConfig",
    "load_config",
    "preset_names",
    "save_config",
]
