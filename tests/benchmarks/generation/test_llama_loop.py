"""llama.cpp in the benchmark of generation, in miniature."""

from pathlib import Path

import pytest

from benchmarks.generation.authors_loop import AuthorsLoop, write_model
from benchmarks.generation.shapes import TINY_SHAPE

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it is built from source)")


def test_llama_cpp_generates_what_the_authors_loop_does(tmp_path: Path) -> None:
    from benchmarks.generation.llama_loop import LlamaLoop, write_gguf

    write_model(tmp_path, TINY_SHAPE)
    write_gguf(tmp_path)
    loops = (LlamaLoop(tmp_path, TINY_SHAPE, 1), AuthorsLoop(tmp_path, TINY_SHAPE))
    for loop in loops:
        loop.warm_up()
        for _ in range(TINY_SHAPE.blocks):
            loop.block()
    assert loops[0].texts() == loops[1].texts()
