"""Where a run happens: device, process groups, and the adaptor that lets megatron-core run on a CPU."""

from illada_megatron.runtime.device import Capability, Device, capabilities, select_device
from illada_megatron.runtime.distributed import Runtime, is_rank, runtime, world_size_from_environment

__all__ = [
    "Capability",
    "Device",
    "Runtime",
    "capabilities",
    "is_rank",
    "runtime",
    "select_device",
    "world_size_from_environment",
]
