"""Builds the C++ and CUDA extensions; everything else about the package is in pyproject.toml.

`illada_megatron.ops._kernels` is built against the torch that is installed: `pip install --no-build-isolation`.
ILLADA_CUDA=1 demands its CUDA part, ILLADA_CUDA=0 leaves it out; unset, it is built where torch is a CUDA build and
nvcc is found.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.modified import newer_group

try:
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils import cpp_extension
    from torch.version import cuda as torch_cuda
except ModuleNotFoundError as missing:
    sys.exit(
        f"building illada-megatron needs {missing.name}: install torch and pybind11 first, then run pip with "
        "--no-build-isolation (`make` does both)"
    )

# ATen's names and flags of the instruction sets that vectorised kernels are compiled for; each is chosen at run time
_X86_CAPABILITIES = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_CAPABILITIES = {"DEFAULT": []} | (_X86_CAPABILITIES if _IS_X86 else {})


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, which compiles C++ on all cores (or MAX_JOBS of them), an extension's `kernels` once for each
    instruction set, and leaves the CUDA part out where it does not build and nobody has asked for it."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:  # of torch's checks of versions, of nvcc, of the linker
            if os.environ.get("ILLADA_CUDA") == "1" or not any(getattr(one, "cuda", False) for one in self.extensions):
                raise
            text = " ".join(str(error).split())
            text = re.sub(r"(?i)command '?\['([^']+)'.*\]'?", r"\1", text)  # a command without its arguments
            reason = f"{text[:300] or type(error).__name__} (`pip install -v` shows what it said)"
            for extension in self.extensions:
                if getattr(extension, "cuda", False):
                    vars(extension).update(vars(kernels(f"it did not build: {reason}")))
            super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        made_of = [*extension.sources, *extension.depends]
        if not self.force and not newer_group(made_of, self.get_ext_fullpath(extension.name), "newer"):
            return
        plain = [source for source in extension.sources if source.endswith(".cpp")]
        jobs = [(source, self.build_temp, [], []) for source in plain]
        jobs += [
            (kernel, Path(self.build_temp, name), [("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None)], flags)
            for kernel in getattr(extension, "kernels", [])
            for name, flags in _CAPABILITIES.items()
        ]
        given = extension.extra_compile_args
        common = given["cxx"] if isinstance(given, dict) else given

        def compiled(job: tuple[str, Path | str, list[tuple[str, str | None]], list[str]]) -> list[str]:
            source, folder, macros, flags = job
            return self.compiler.compile(
                [source],
                output_dir=str(folder),
                macros=[*extension.define_macros, *macros],
                include_dirs=extension.include_dirs,
                extra_postargs=[*common, *flags],
                depends=extension.depends,
            )

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            extension.extra_objects += [made for found in pool.map(compiled, jobs) for made in found]
        extension.sources = [source for source in extension.sources if source not in plain]
        extension.depends = made_of  # else it would not be linked again where one of these alone has changed
        super().build_extension(extension)


def indexed_dataset() -> Extension:
    """The reader, writer and merger of shards; knows no torch."""
    return Pybind11Extension(
        "illada_megatron.data.shards._indexed_dataset",
        _sources("csrc/indexed_dataset/*.cpp"),
        depends=_sources("csrc/indexed_dataset/*.h"),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
    )


def kernels(without_cuda: str) -> Extension:
    """The operators of torch.ops.illada; `without_cuda`: why their CUDA part is left out, "" where it is not. The
    module keeps the reason, which `illada doctor` shows, and the architectures, which a GPU's is compared with."""
    with_cuda = not without_cuda
    if without_cuda:
        print(f"illada_megatron.ops._kernels is built without its CUDA part: {without_cuda}")
        architectures = ""
    else:
        cpp_extension.CUDA_HOME = _cuda_home(cpp_extension.CUDA_HOME)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or _architectures(cpp_extension.CUDA_HOME)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    vectorised = _sources("csrc/*/cpu_kernels*.cpp")
    folders = ("cpu", "generation", "layer_kernels", "masked_cross_entropy")
    sources = {source for folder in folders for source in _sources(f"csrc/{folder}/*.cpp")} - {*vectorised}
    cuda = {*_sources("csrc/*/cuda_*.cpp"), *_sources("csrc/*/cuda_*.cu")}
    # -fopenmp only compiles: the one OpenMP runtime of the process is that of torch's libraries. GCC 12 takes its own
    # intrinsics for uninitialised.
    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags += [f"-DHAVE_{capability}_CPU_DEFINITION" for capability in _CAPABILITIES if capability != "DEFAULT"]
    extension = make(
        "illada_megatron.ops._kernels",
        sorted((sources | cuda) if with_cuda else (sources - cuda)),
        depends=[*vectorised, *_sources("csrc/*/*.h"), *_sources("csrc/*/*.cuh")],
        define_macros=[
            ("WITHOUT_CUDA", json.dumps(without_cuda, ensure_ascii=True)),
            ("CUDA_ARCHITECTURES", json.dumps(architectures, ensure_ascii=True)),
        ],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]},
    )
    extension.kernels, extension.cuda = vectorised, with_cuda
    return extension


def _without_cuda() -> str:
    """Why the CUDA part is left out; "": it is built."""
    wish = os.environ.get("ILLADA_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"ILLADA_CUDA must be 0 or 1 (or unset), found {wish!r}")
    if wish == "0":
        return "ILLADA_CUDA=0"
    problem = _cuda_problem()
    if wish == "1" and problem:
        sys.exit(f"ILLADA_CUDA=1, but {problem}: mend that, or unset ILLADA_CUDA")
    return problem


def _cuda_problem() -> str:
    """What is missing, or too old; "": nothing."""
    if not torch_cuda:
        return "torch is not a CUDA build"
    if not cpp_extension.CUDA_HOME:
        return "nvcc was not found (on the PATH, or in CUDA_HOME)"
    try:
        told = _nvcc(cpp_extension.CUDA_HOME, "--version").stdout
    except OSError as error:  # a CUDA folder for running alone, or one that is gone
        return f"nvcc does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", told)
    if not release or int(release[1]) < int(torch_cuda.partition(".")[0]):
        found = f"{release[1]}.{release[2]}" if release else "one that does not say its release"
        return f"nvcc is {found}, and torch was built with CUDA {torch_cuda}"
    return ""


def _cuda_home(found: str) -> str:
    """CUDA's folder. torch takes the one above nvcc, which is another where that is a wrapper; nvcc itself knows."""
    if Path(found, "include", "cuda_runtime.h").is_file():
        return found
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        told = _nvcc(found, "--dryrun", empty.name).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return os.path.normpath(top[1].strip()) if top else found


def _architectures(cuda_home: str) -> str:
    """For TORCH_CUDA_ARCH_LIST: A100, H100 and, where nvcc knows it, B200, and PTX of the newest; what GPU this machine
    has, if any, does not matter."""
    known = _nvcc(cuda_home, "--list-gpu-arch").stdout.split()
    return ";".join(arch for arch in ("8.0", "9.0", "10.0") if f"compute_{arch.replace('.', '')}" in known) + "+PTX"


def _nvcc(cuda_home: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Of CUDA's folder; raises OSError where it has none that can be run."""
    return subprocess.run([str(Path(cuda_home, "bin", "nvcc")), *arguments], capture_output=True, text=True)


def _sources(pattern: str) -> list[str]:
    return sorted(map(str, Path().glob(pattern)))


setup(
    ext_modules=[indexed_dataset(), kernels(_without_cuda())],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
