"""llama.cpp on a file that `illada convert to-gguf` writes, through its Python package (llama-cpp-python), and the
plain loop over it: of fixed length and at temperature 0, all positions' logits in every step, for llama.cpp computes no
fewer of such a model; the block's surest masks are revealed.

Importable only where llama-cpp-python is installed, which is built from source:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python==0.3.36
"""

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from benchmarks.generation.fixed_loop import FixedLoop
from benchmarks.generation.shapes import Shape
from benchmarks.step.workloads import MASK_TOKEN_ID

GGUF = "model.gguf"


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    """llama.cpp tells some 100 lines of a model."""


class LlamaModel:
    """A GGUF file in llama.cpp, for texts of up to `longest` tokens, on the CPU. Raises ValueError where it cannot be
    loaded."""

    def __init__(self, path: Path, longest: int, threads: int = 1) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError(f"{path}: llama.cpp does not load it")
        context = llama_cpp.llama_context_default_params()
        # a text is one batch: its positions see each other only there
        context.n_ctx = context.n_batch = context.n_ubatch = longest
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # its keys and values are fp16
        context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise ValueError(f"{path}: llama.cpp makes no context of {longest} tokens")
        llama_cpp.llama_set_causal_attn(self._context, False)
        self._batch = llama_cpp.llama_batch_init(longest, 0, 1)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self.is_diffusion: bool = llama_cpp.llama_model_is_diffusion(self._model)
        self.mask_token_id: int = llama_cpp.llama_vocab_mask(self._vocabulary)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[s] -> [s, v] float32, in llama.cpp's memory until the next call. Raises ValueError."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for position, token in enumerate(tokens):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, True
        if code := llama_cpp.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode returned {code}")
        found = llama_cpp.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (len(tokens), self.vocab_size)))

    def encode(self, text: str) -> list[int]:
        """Its tokenizer's ids; names of special tokens are text. Raises ValueError."""
        content = text.encode()
        ids = (llama_cpp.llama_token * (len(content) + 8))()
        count = llama_cpp.llama_tokenize(self._vocabulary, content, len(content), ids, len(ids), True, False)
        if count < 0:
            raise ValueError(f"llama_tokenize asks for room for {-count} tokens")
        return list(ids[:count])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        count = -64 * len(tokens) - 1
        while count < 0:  # more room is asked for
            room = ctypes.create_string_buffer(1 - count)
            count = llama_cpp.llama_detokenize(self._vocabulary, ids, len(tokens), room, len(room), True, False)
        return room.raw[:count].decode(errors="replace")

    def close(self) -> None:
        """Give its memory back."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def write_gguf(folder: Path) -> None:
    """The Hugging Face directory `folder` as folder/model.gguf, fp32, without a tokenizer."""
    from illada_megatron.checkpoint.gguf.exporting import export_gguf
    from illada_megatron.checkpoint.hugging_face.importing import import_weights, open_source
    from illada_megatron.checkpoint.predictor import find_checkpoint

    with tempfile.TemporaryDirectory(dir=folder) as between:
        import_weights(open_source(folder), between)
        export_gguf(find_checkpoint(between), folder / GGUF, "fp32")


class LlamaLoop(FixedLoop):
    """Of the one prompt."""

    def __init__(self, folder: Path, shape: Shape, threads: int) -> None:
        """folder: with what `write_gguf` has written."""
        self._model = LlamaModel(folder / GGUF, shape.tokens, threads)
        super().__init__(shape)

    def _step(self, reveals: int) -> None:
        tokens, begin = self._tokens[0], self._shape.prompt + self._blocks * self._shape.block_length
        masks = begin + (tokens[begin : begin + self._shape.block_length] == MASK_TOKEN_ID).nonzero().flatten()
        logits = self._model.logits(tokens.tolist())[masks]
        logits[:, MASK_TOKEN_ID] = -torch.inf  # as in the authors' loop
        confidence, candidates = logits.softmax(-1).max(-1)
        rows = confidence.topk(reveals).indices
        tokens[masks[rows]] = candidates[rows]
