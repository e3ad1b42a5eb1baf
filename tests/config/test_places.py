"""A run's folder in the configuration: what lies in it, what may lie elsewhere, and what moves with it."""

from pathlib import Path

import pytest

from illada_megatron.config import ConfigError, load_config
from illada_megatron.config.load import to_yaml


def test_everything_lies_in_the_folder_unless_it_is_given() -> None:
    config = load_config("tiny", ["run_dir=runs/a/"])
    assert (config.run_dir, config.checkpoint.save_dir) == ("runs/a", "runs/a/checkpoints")
    assert config.logging.tensorboard_dir == "runs/a/tensorboard"
    assert config.logging.jsonl_path == "runs/a/steps.jsonl"
    config = load_config("tiny", ["run_dir=runs/a", "checkpoint.save_dir=s3://b/a", "logging.jsonl_path=null"])
    assert (config.checkpoint.save_dir, config.logging.jsonl_path) == ("s3://b/a", None)
    assert load_config("tiny").logging.tensorboard_dir is None


@pytest.mark.parametrize("override", ["logging.interval_steps=7", "checkpoint.save_dir=s3://b/a"])
def test_a_saved_configuration_reads_back_equal_and_is_another_runs_elsewhere(override: str, tmp_path: Path) -> None:
    """Were the places written out, a run started from another's file would go on in that one's checkpoints."""
    config = load_config("tiny", ["run_dir=runs/a", override])
    path = tmp_path / "start_0001.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    other = load_config(path, ["run_dir=runs/b"])
    assert other.logging.jsonl_path == "runs/b/steps.jsonl"
    assert other.checkpoint.save_dir in ("runs/b/checkpoints", "s3://b/a")


@pytest.mark.parametrize("run_dir", ["s3://bucket/run", "/", "''"])
def test_no_folder_of_a_file_system(run_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"run_dir .*: expected a folder of a file system"):
        load_config("tiny", [f"run_dir={run_dir}"])


def test_weights_and_biases_needs_the_folder() -> None:
    with pytest.raises(ConfigError, match=r"logging\.wandb_project p needs run_dir"):
        load_config("tiny", ["logging.wandb_project=p"])
