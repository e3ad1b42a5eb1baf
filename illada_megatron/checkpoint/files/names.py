"""Names in a checkpoint: of files; of tensors, a parameter's weight by its canonical name, its optimizer state behind a
prefix."""

from typing import NamedTuple

from illada_megatron.config.parameters import Parameter

WEIGHT = ""
# what the optimizer keeps of a parameter, all fp32; "main": the weight itself where the model's is not fp32
OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "main")
_PREFIX = "optimizer."


class TensorName(NamedTuple):
    """What a tensor of a checkpoint is."""

    parameter: str
    state: str
    """WEIGHT, or one of OPTIMIZER_STATE."""


def tensor_name(parameter: str, state: str) -> str:
    """Name in a checkpoint of a parameter's weight or optimizer state."""
    return f"{_PREFIX}{state}.{parameter}" if state else parameter


def split_name(name: str) -> TensorName:
    """The other way round."""
    if name.startswith(_PREFIX):
        state, _, parameter = name.removeprefix(_PREFIX).partition(".")
        return TensorName(parameter, state)
    return TensorName(name, WEIGHT)


def names_of(parameter: Parameter) -> list[str]:
    """All names that a checkpoint may hold of a parameter."""
    return [tensor_name(parameter.name, state) for state in (WEIGHT, *OPTIMIZER_STATE)]


def is_file_name(name: str) -> bool:
    """Whether a name that a file gives is one of its own folder: no path, nothing that a system takes for something
    else."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()
