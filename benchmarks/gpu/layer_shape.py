"""The layers of iLLaDA-8B on one GPU: as many as fit, by the planner's memory."""

from dataclasses import dataclass

from benchmarks.step.workloads import Workload
from illada_megatron.config import load_config
from illada_megatron.planning import MEMORY_SHARE, Candidate, load_device, memory, workload
from illada_megatron.planning import Workload as PlannedWork
from illada_megatron.planning.device import Figure

MICRO_BATCHES = 4
"""Of a step."""
# Of all logits at a time in megatron-core's loss: bf16, fp32, their softmax in fp32, the gradient in bf16
# (core/tensor_parallel/cross_entropy.py)
_PEER_LOGIT_BYTES = 2 + 4 + 4 + 2


@dataclass(frozen=True)
class Fitting:
    """Numbers of layers."""

    ours: int
    peer: int
    """Where all logits have to fit too."""

    def of_local_layers(self) -> "Fitting":
        """Half as many: without Transformer Engine torch's own operators keep more of a layer, which the planner does
        not know. A guess until it is measured."""
        return Fitting(max(1, self.ours // 2), max(1, self.peer // 2))


def layers_that_fit(gpu_bytes: int) -> Fitting:
    """Of iLLaDA-8B's 32, trained by one process in bf16 and in FP8 on sequences of 8,192 tokens, one a micro-batch.
    Raises ValueError where none fits."""
    model = load_config("illada-8b").model
    logits = _PEER_LOGIT_BYTES * model.max_sequence_length * model.padded_vocab_size
    numbers = range(1, model.num_layers + 1)
    device = load_device("h100").model_copy(update={"memory_bytes": Figure(value=gpu_bytes, source="torch")})
    needs = {
        layers: max(memory(*_planned(layers, precision), device).total for precision in ("bf16", "fp8"))
        for layers in numbers
    }
    ours, peer = (
        max((layers for layers in numbers if needs[layers] + more <= MEMORY_SHARE * gpu_bytes), default=0)
        for more in (0, logits)
    )
    if peer == 0:
        raise ValueError(f"a GPU of {gpu_bytes / 2**30:.0f} GiB holds no layer of iLLaDA-8B with all logits beside it")
    return Fitting(ours, peer)


def _planned(layers: int, precision: str) -> tuple[PlannedWork, Candidate]:
    config = load_config("illada-8b", [f"model.num_layers={layers}"])
    return workload(config), Candidate(1, 1, 1, 1, 1, 1, "none", precision, ((layers,),))


def workload_of(layers: int) -> Workload:
    """`layers` layers of iLLaDA-8B with its embedding and head."""
    model = load_config("illada-8b").model
    return Workload(
        f"8B, {layers} layers",
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_layers=layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        sequence_length=model.max_sequence_length,
        micro_batch_size=1,
        global_batch_size=MICRO_BATCHES,
    )
