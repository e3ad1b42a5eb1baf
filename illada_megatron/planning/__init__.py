"""What a run would do, computed before it is started: the layouts that fit, their memory and speed, and its goodput
under failures.

In: a configuration, a device's data file, numbers.
Out: numbers, and the lines that say how they come about.
Never imported here: torch, megatron-core, anything that measures or starts.
"""

from illada_megatron.planning.device import Device, device_names, load_device
from illada_megatron.planning.failures import (
    FaultModel,
    SimulatedRun,
    best_interval,
    daly_interval,
    expected_goodput,
    planned_goodput,
    simulate,
    young_interval,
)
from illada_megatron.planning.measured import Measured, PlanError, measured_in
from illada_megatron.planning.memory import Memory, Part, memory
from illada_megatron.planning.report import MEMORY_COLUMNS, as_json, explained, layout_words, memory_gib
from illada_megatron.planning.search import MEMORY_SHARE, Planned, fp8_refusal, planned, search, smallest
from illada_megatron.planning.step_time import Step, step_time
from illada_megatron.planning.workload import Candidate, Workload, stage_layers, workload

__all__ = [
    "MEMORY_COLUMNS",
    "MEMORY_SHARE",
    "Candidate",
    "Device",
    "FaultModel",
    "Measured",
    "Memory",
    "Part",
    "PlanError",
    "Planned",
    "SimulatedRun",
    "Step",
    "Workload",
    "as_json",
    "best_interval",
    "daly_interval",
    "device_names",
    "expected_goodput",
    "explained",
    "fp8_refusal",
    "layout_words",
    "load_device",
    "measured_in",
    "memory",
    "memory_gib",
    "planned",
    "planned_goodput",
    "search",
    "simulate",
    "smallest",
    "stage_layers",
    "step_time",
    "workload",
    "young_interval",
]
