"""Builds the C++ extension; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "illada_megatron.data._indexed_dataset",
            ["csrc/indexed_dataset/bindings.cpp", "csrc/indexed_dataset/builder.cpp"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
