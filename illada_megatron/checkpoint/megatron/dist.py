"""Checkpoints of megatron-core's dist_checkpointing (`--ckpt-format torch_dist`) as whole tensors of canonical names.

The same files as this program's, but the layers of each kind lie in one tensor, [layers, ...], and the fp32 main
weights and moments are called optimizer.state.{param or fp32_param, exp_avg, exp_avg_sq}. Source: megatron-core's
transformer_block.sharded_state_dict and distrib_optimizer.sharded_param_state_fully_reshardable (0.16).
"""

from collections.abc import Sequence

from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.metadata import TensorInfo
from illada_megatron.checkpoint.files.names import WEIGHT, tensor_name
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import layer_of, parameters

# main weights: of the plain optimizer (and an older form of the distributed one), and of the distributed one
_STATE = {"exp_avg": ("exp_avg",), "exp_avg_sq": ("exp_avg_sq",), "main": ("fp32_param", "param")}
_LAYERS = "decoder.layers."
# the local layers are saved under Transformer Engine's names, where a norm belongs to the linear layer behind it
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class MegatronDistSource:
    """See `sources.Source`."""

    def __init__(self, reader: TensorReader, model: ModelConfig, with_main: bool) -> None:
        """with_main: the model is not fp32, so that its main weights are tensors of their own."""
        self._reader = reader
        self._places: dict[str, tuple[str, int | None]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        states = [state for state in _STATE if with_main or state != "main"]
        for parameter in parameters(model):
            for state in (WEIGHT, *states):
                self._find(tensor_name(parameter.name, state), parameter.name, parameter.shape, state, model)
        if not any(name.startswith("optimizer.") for name in self.tensors):
            buckets = [name for name in reader.tensors if name.startswith(("optimizer.distributed", "chained_"))]
            if buckets:
                raise CheckpointError(
                    f"{reader.place}: its optimizer's state is stored by data-parallel buckets ({buckets[0]}), which "
                    "only its own layout can read: save it with --dist-ckpt-optim-fully-reshardable"
                )

    def read(
        self,
        name: str,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `tensors.TensorReader.read`."""
        if name not in self._places:
            raise CheckpointError(f"{self._reader.place}: holds no tensor {name}")
        saved, layer = self._places[name]
        whole = self.tensors[name].shape
        at, size = tuple(offset or (0,) * len(whole)), tuple(shape or whole)
        if layer is None:
            return self._reader.read(saved, at, size, out)
        return self._reader.read(saved, (layer, *at), (1, *size), out).view(size)

    def _find(self, name: str, parameter: str, shape: tuple[int, ...], state: str, model: ModelConfig) -> None:
        layer = layer_of(parameter)
        within = parameter if layer is None else parameter.removeprefix(f"{_LAYERS}{layer}.")
        candidates: list[tuple[str, int | None]] = []
        for prefix in [f"optimizer.state.{key}." for key in _STATE[state]] if state else [""]:
            candidates.append((prefix + parameter, None))
            if layer is not None:
                for spelled in (within, _NORMS.get(within, within)):
                    stacked, single = f"{prefix}{_LAYERS}{spelled}", f"{prefix}{_LAYERS}{layer}.{spelled}"
                    candidates += [(stacked, layer), (single, None)]
        for saved, index in candidates:
            info = self._reader.tensors.get(saved)
            if info is None:
                continue
            wanted = shape if index is None else (model.num_layers, *shape)
            if info.shape != wanted:
                raise CheckpointError(
                    f"{self._reader.place}: {saved} has shape {info.shape}, expected {wanted}: correct model.*"
                )
            self._places[name] = (saved, index)
            self.tensors[name] = TensorInfo(shape, info.dtype, [])
            return
