"""Where a run happens: device, process groups, and the adaptor that lets megatron-core run on a CPU.

In: a configuration, what the launcher put into the environment.
Out: a `Runtime`: this rank's device and place.
Never imported here: data, models, checkpoints, training.
"""

from illada_megatron.runtime.device import Capability, Device, capabilities, select_device
from illada_megatron.runtime.distributed import (
    Runtime,
    configured_for,
    end_with_launcher,
    is_rank,
    rank_from_environment,
    runtime,
    world_size_from_environment,
)
from illada_megatron.runtime.process_groups import count_groups
from illada_megatron.runtime.slurm import adopt_slurm_rank

__all__ = [
    "Capability",
    "Device",
    "Runtime",
    "adopt_slurm_rank",
    "capabilities",
    "configured_for",
    "count_groups",
    "end_with_launcher",
    "is_rank",
    "rank_from_environment",
    "runtime",
    "select_device",
    "world_size_from_environment",
]
