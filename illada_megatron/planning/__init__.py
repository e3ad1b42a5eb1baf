"""What a run would do, computed before it is started: its goodput under failures.

In: numbers.
Out: numbers.
Never imported here: torch, megatron-core, anything that measures or starts.
"""

from illada_megatron.planning.failures import (
    FaultModel,
    SimulatedRun,
    best_interval,
    daly_interval,
    expected_goodput,
    simulate,
    young_interval,
)
from illada_megatron.planning.measured import Measured, PlanError, measured_in

__all__ = [
    "FaultModel",
    "Measured",
    "PlanError",
    "SimulatedRun",
    "best_interval",
    "daly_interval",
    "expected_goodput",
    "measured_in",
    "simulate",
    "young_interval",
]
