"""Whether a checkpoint and a directory are the same model: logits of the mask predictor here against those of the
modeling file that goes with an export. No code of the directory is run.

Both compute in fp32, with weights rounded to the coarser of the two precisions: what is left is the order of sums. One
after the other, so that memory holds one model in fp32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.names import EMA, tensor_name
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.hugging_face.config_json import config_json, read_config_json
from illada_megatron.checkpoint.hugging_face.layouts import LLADA, Layout
from illada_megatron.checkpoint.predictor import ONE_STAGE, saved_config
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import canonical_name

TOLERANCE = 1e-4
"""Of the largest logit. fp32 sums in another order differ by about 1e-6; a head in the wrong place by about 1."""
_SEQUENCES, _LENGTH = 4, 64


@dataclass(frozen=True)
class Verified:
    """How far two models are apart."""

    largest_difference: float
    largest_logit: float
    rounded_to: str

    def check(self) -> None:
        """Raises CheckpointError where they are two models."""
        if not self.largest_difference <= TOLERANCE * self.largest_logit:
            raise CheckpointError(
                f"the logits differ by up to {self.largest_difference:.3g} (the largest is {self.largest_logit:.3g}), "
                f"expected at most {TOLERANCE:g} of it: these are two models"
            )


def check_transformers() -> None:
    """Raises CheckpointError where `verify` could not run: better before a conversion than after it."""
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise CheckpointError(
            "--verify computes with transformers: pip install 'illada-megatron[huggingface]'"
        ) from error


def verify(info: CheckpointInfo, directory: Path, seed: int = 0, ema: bool = False) -> Verified:
    """Compare a checkpoint with a directory in any layout that can be imported, on random sequences with masks. Needs
    transformers. Raises CheckpointError where they cannot be compared."""
    foreign, reader = read_config_json(directory), TensorReader(info.path)
    model = saved_config(info).model
    vocab_size = min(foreign.fields["vocab_size"], model.vocab_size)  # without a mask that was added
    generator = torch.Generator().manual_seed(seed)
    length = min(_LENGTH, model.max_sequence_length)
    tokens = torch.randint(0, vocab_size, (_SEQUENCES, length), generator=generator)
    if model.mask_token_id < vocab_size:
        tokens[torch.rand(tokens.shape, generator=generator) < 0.5] = model.mask_token_id
    theirs, dtype = _foreign_logits(directory, foreign.layout, model, foreign.fields, tokens, reader)
    ours = _own_logits(info, reader, tokens, dtype, ema)[..., :vocab_size]
    difference, largest = (ours - theirs[..., :vocab_size]).abs().max().item(), ours.abs().max().item()
    return Verified(difference, largest, str(dtype).removeprefix("torch."))


def _foreign_logits(
    directory: Path, layout: Layout, model: ModelConfig, fields: dict[str, Any], tokens: Tensor, reader: TensorReader
) -> tuple[Tensor, torch.dtype]:
    """(logits, the coarser of the directory's and the checkpoint's precisions)."""
    from illada_megatron.checkpoint.hugging_face.safetensors_files import SafetensorsReader

    kinds = {stored.dtype for stored in SafetensorsReader(directory).tensors.values()}
    kinds |= {info.dtype for name, info in reader.tensors.items() if tensor_name(name, "main") not in reader.tensors}
    coarse = torch.bfloat16 if torch.bfloat16 in kinds else torch.float32
    config_class, model_class = _classes(layout)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # the directory's own shape: where a head was untied or a mask added, the checkpoint's differs
    shape = {**model.model_dump(), **fields, "mask_token_id": 0, "exclude_mask_logit": False}
    native = ModelConfig.model_validate(shape)
    config = config_class(**{**config_json(layout, native, "float32", {}), "auto_map": None})
    network = model_class.from_pretrained(
        directory, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()
    _round(network, coarse)
    with torch.no_grad():
        return network(tokens).logits, coarse


def _classes(layout: Layout) -> tuple[Any, Any]:
    check_transformers()
    from illada_megatron.checkpoint.hugging_face import (
        configuration_illada,
        configuration_llada,
        modeling_illada,
        modeling_llada,
    )

    if layout is LLADA:
        return configuration_llada.LLaDAConfig, modeling_llada.LLaDAModelLM
    return configuration_illada.ILLaDAConfig, modeling_illada.ILLaDAForCausalLM


def _own_logits(info: CheckpointInfo, reader: TensorReader, tokens: Tensor, dtype: torch.dtype, ema: bool) -> Tensor:
    from illada_megatron.runtime import runtime

    fp32 = ("parallel.tensor_model_parallel_size=1", "training.precision=fp32", "runtime.device=cpu")
    config = saved_config(info, [*ONE_STAGE, *fp32, "model.exclude_mask_logit=false"])  # -inf compares with nothing
    with runtime(config) as run, torch.no_grad():
        from illada_megatron.model import build_model_chunks, equal_segments

        (model,) = build_model_chunks(config, run.device)
        for name, parameter in model.named_parameters():
            saved = canonical_name(name, 0, config.model.tie_word_embeddings)
            # an export in fp32 is of the main weights
            main = tensor_name(saved, "main")
            if ema:
                saved = tensor_name(saved, EMA)
            elif dtype == torch.float32 and main in reader.tensors:
                saved = main
            reader.read(saved, out=parameter.data)
        _round(model, dtype)
        batch, length = tokens.shape
        hidden = model(tokens.view(1, -1), equal_segments(batch, length, run.device.torch_device))
        return model.logits(hidden).view(batch, length, -1)


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
