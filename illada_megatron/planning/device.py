"""GPUs as data files: what a layout's memory and speed are computed from, each figure with its source."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import PositiveFloat, PositiveInt, ValidationError

from illada_megatron.config.schema.base import Section
from illada_megatron.config.schema.precision import Recipe
from illada_megatron.planning.measured import PlanError

_DEVICES = files("illada_megatron.planning") / "devices"


class Figure(Section):
    """A number and where it is from."""

    value: PositiveFloat
    source: str


class Device(Section):
    """A GPU and what connects it to others; bandwidths are one way, of one GPU."""

    name: str
    memory_bytes: Figure
    """What programs can have of it, CUDA's own part included."""
    memory_bytes_per_second: Figure
    bf16_peak_flops: Figure
    """Without sparsity; MFU is relative to it..."""
    fp8_peak_flops: Figure
    """...or to this one."""
    bf16_product_flops: Figure
    """The best that a matrix product was measured at..."""
    fp8_product_flops: Figure
    """...and one in FP8."""
    attention_flops: Figure
    """The best that attention was measured at."""
    node_bytes_per_second: Figure
    """Bus bandwidth of collectives within a machine."""
    network_bytes_per_second: Figure
    """The same between machines."""
    kernel_share: Figure
    """Of the best that products, attention and memory were measured at, what a training step's kernels reach."""
    gpus_per_node: PositiveInt
    fp8_recipes: list[Recipe]
    fp8_weight_copies: Literal[1, 2]
    """How often the products of a step want an FP8 weight: as it is, and transposed."""

    def peak_flops(self, precision: str) -> float:
        """Of the number format that the layers' products are in."""
        return (self.fp8_peak_flops if precision == "fp8" else self.bf16_peak_flops).value

    def product_flops(self, precision: str) -> float:
        """The same of the best product measured."""
        return (self.fp8_product_flops if precision == "fp8" else self.bf16_product_flops).value

    @property
    def memory_rate(self) -> float:
        """Bytes a second that kernels bound by memory move."""
        return self.memory_bytes_per_second.value * self.kernel_share.value


def device_names() -> list[str]:
    """Names that `load_device` takes beside paths."""
    return sorted(path.name.removesuffix(".yaml") for path in _DEVICES.iterdir() if path.name.endswith(".yaml"))


def load_device(name: str) -> Device:
    """A device by its name here, or from a YAML file with the same fields. Raises PlanError."""
    own = name.endswith((".yaml", ".yml"))
    if not own and name not in device_names():
        raise PlanError(f"device {name}: there are {', '.join(device_names())}; or give a YAML file like theirs")
    try:
        text = Path(name).read_text() if own else (_DEVICES / f"{name}.yaml").read_text()
        return Device.model_validate(yaml.safe_load(text))
    except OSError as error:
        raise PlanError(f"{name}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise PlanError(f"{name}: not a device: {error}") from error
