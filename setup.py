"""Builds the C++ extension; everything else about the package is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "illada_megatron.data._indexed_dataset",
            sorted(map(str, Path("csrc/indexed_dataset").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc/indexed_dataset").glob("*.h"))),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
