"""Names in a checkpoint: of files; of tensors, a parameter's weight by its canonical name, its optimizer state behind a
prefix."""

from collections.abc import Container
from typing import NamedTuple

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.config.parameters import EMBEDDING

WEIGHT = ""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's."""
EMA = "ema"
"""The moving average of the weights (optimizer.ema_decay)."""
# what the optimizer keeps of a parameter, all fp32; "main": the weight itself where the model's is not fp32
OPTIMIZER_STATE = (*MOMENTS, "main", EMA)
FP8 = "fp8."
"""What delayed scaling keeps of a linear layer: behind it scale or amax_history, and of which direction."""
_PREFIX = "optimizer."


class TensorName(NamedTuple):
    """What a tensor of a checkpoint is."""

    parameter: str
    state: str
    """WEIGHT, one of OPTIMIZER_STATE, or FP8 with what follows it."""


def tensor_name(parameter: str, state: str) -> str:
    """Name in a checkpoint of a parameter's weight or optimizer state, or of a layer's FP8 state."""
    if state.startswith(FP8):
        return f"{state}.{parameter}"
    return f"{_PREFIX}{state}.{parameter}" if state else parameter


def split_name(name: str) -> TensorName:
    """The other way round."""
    if name.startswith(_PREFIX):
        state, _, parameter = name.removeprefix(_PREFIX).partition(".")
        return TensorName(parameter, state)
    if name.startswith(FP8):
        state, _, layer = name.removeprefix(FP8).partition(".")
        return TensorName(layer, f"{FP8}{state}")
    return TensorName(name, WEIGHT)


def has_ema(names: Container[str]) -> bool:
    """Whether the run that saved tensors of these names kept the moving average of its weights."""
    return tensor_name(EMBEDDING, EMA) in names


def weights_state(names: Container[str], place: object, ema: bool) -> str:
    """Which of the tensors of a checkpoint at `place` are taken for the weights of the model, as `tensor_name` has it:
    the weights, or their moving average. Raises CheckpointError where it has none."""
    if ema and not has_ema(names):
        raise CheckpointError(
            f"{place}: holds no moving average of the weights (its run had no optimizer.ema_decay): leave out --ema"
        )
    return EMA if ema else WEIGHT


def is_file_name(name: str) -> bool:
    """Whether a name that a file gives is one of its own folder: no path, nothing that a system takes for something
    else."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable()
