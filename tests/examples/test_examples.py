"""Everything under examples/ that a reader may start has to start."""

import subprocess
from pathlib import Path

import pytest

from illada_megatron.config import load_config
from illada_megatron.config.layout import choose_layout

EXAMPLES = Path(__file__).parents[2] / "examples"
# World sizes that each configuration's comments promise; the demo runs its own at two layouts.
WORLDS = {
    "demo/config.yaml": [(2, ()), (4, ("parallel.tensor_model_parallel_size=2",))],
    "demo/quick.yaml": [(2, ()), (4, ("parallel.tensor_model_parallel_size=2",))],
    "tiny/config.yaml": [(1, ()), (2, ()), (4, ("parallel.tensor_model_parallel_size=2",))],
    "illada_8b/config.yaml": [(8, ())],
    "illada_8b/config_1024_gpus.yaml": [(1024, ()), (640, ()), (512, ())],
}
PIPELINE = "parallel.pipeline_model_parallel_size=2"


def test_no_configuration_is_left_out() -> None:
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml")} == set(WORLDS)


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
    words = script.read_text().split()
    configurations = [word for word in words if word.startswith("examples/") and word.endswith(".yaml")]
    assert configurations, "the script starts no configuration"
    for configuration in configurations:
        assert (EXAMPLES.parent / configuration).is_file()
    assert script.stat().st_mode & 0o111, "not executable"
