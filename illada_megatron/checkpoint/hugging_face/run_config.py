"""The configuration of the runs that begin with imported weights, as a file to train with."""

from pathlib import Path

import yaml

from illada_megatron.checkpoint.hugging_face.importing import Source
from illada_megatron.system.whole_file import replaced


def write_run_config(source: Source, checkpoint: str, path: Path) -> None:
    """What `load_config` reads as `source.config`, with `checkpoint.load_dir`: the whole model, and of all else what
    differs from the defaults. Raises OSError."""
    values = source.config.model_dump(mode="json", exclude_defaults=True)
    values["model"] = source.config.model.model_dump(mode="json")
    values["checkpoint"] = {**values.get("checkpoint", {}), "load_dir": _from_anywhere(checkpoint)}
    if source.config.data.tokenizer_path is not None:
        values["data"]["tokenizer_path"] = _from_anywhere(source.config.data.tokenizer_path)
    order = ["model", "data", "training", "checkpoint"]
    sections = {name: values[name] for name in [*order, *sorted(values.keys() - {*order})] if name in values}
    text = (
        f"# Runs that begin with the weights of {str(source.directory.absolute())!r} (illada convert from-hf).\n"
        "# They need data.train_paths (made with data.tokenizer_path) and checkpoint.save_dir beside this.\n"
    ) + yaml.safe_dump(sections, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(text.encode())


def _from_anywhere(name: str) -> str:
    """A path of this machine as an absolute one; s3:// and names on the hub stay."""
    return str(Path(name).absolute()) if Path(name).exists() else name
