"""The schema: one class a concern, field names as in Megatron and the papers. Together they make the `RunConfig` of
`config/layout.py`, which also checks them against each other.

In: values.
Out: sections, each checked by itself.
Never imported here: anything else of the package, torch.
"""

from illada_megatron.config.schema.base import Dtype, Precision, Probability, Recompute, Section, Seed
from illada_megatron.config.schema.data import BlendEntry, BlendPhase, CorpusName, DataConfig, DiffusionConfig
from illada_megatron.config.schema.learning import (
    LossConfig,
    OptimizerConfig,
    ProfileConfig,
    RateChange,
    ScheduleConfig,
    Shape,
    TrainingConfig,
    ValidationConfig,
)
from illada_megatron.config.schema.model import LayoutChoice, ModelConfig, ParallelConfig, RopeScaling
from illada_megatron.config.schema.precision import Fp8Config
from illada_megatron.config.schema.running import CheckpointConfig, FaultsConfig, LoggingConfig, RuntimeConfig

__all__ = [
    "BlendEntry",
    "BlendPhase",
    "CheckpointConfig",
    "CorpusName",
    "DataConfig",
    "DiffusionConfig",
    "Dtype",
    "FaultsConfig",
    "Fp8Config",
    "LayoutChoice",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "Probability",
    "ProfileConfig",
    "RateChange",
    "Recompute",
    "RopeScaling",
    "RuntimeConfig",
    "ScheduleConfig",
    "Section",
    "Seed",
    "Shape",
    "TrainingConfig",
    "ValidationConfig",
]
