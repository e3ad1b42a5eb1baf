"""YAML presets and files plus dotted overrides -> one validated RunConfig: OmegaConf merges, pydantic checks.

`${section.field}` in a file or an override is the value of another field. Nothing reads the environment: with a
configuration from elsewhere, secrets would go to the places that it names. The shell puts variables into overrides.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from illada_megatron.config.layout import RunConfig
from illada_megatron.config.places import PLACES
from illada_megatron.system.whole_file import replaced

# OmegaConf's resolvers, as ${oc.env:NAME}, and ${${...}:NAME}, which may become one
_RESOLVER = re.compile(r"\$\{[^{}]*(:|\$\{)")
_PRESETS = Path(__file__).parent / "presets"


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the field, what was found and what to do."""


def preset_names() -> list[str]:
    """Names that `load_config` and `--config` take beside paths."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_config(
    config: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = (), source: str | None = None
) -> RunConfig:
    """Read a configuration.

    config: a path of a YAML file, the name of a preset, or the values themselves, as a checkpoint has stored them, in
    which nothing is resolved; None: the defaults. A file may name what it builds on with a top-level `base:` (a preset
    or a path relative to the file).
    overrides: `section.field=value`, values as in YAML, the last one wins.
    source: what an error calls the configuration; None: its path.
    Raises ConfigError.
    """
    source = source or (str(config) if isinstance(config, str | Path) else "overrides")
    try:
        layers = _layers(config) if isinstance(config, str | Path) else [_stored(config or {}, source)]
        for text in overrides:
            if "=" not in text:
                raise ConfigError(f"override {text!r}: expected section.field=value, as training.lr=1e-3")
            layers.append(OmegaConf.from_dotlist([text]))
            _require_plain(layers[-1], text)
        values = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: {error}") from error
    return _validate(values, source)


def _stored(values: Mapping[str, Any], source: str) -> Any:
    """What a checkpoint says is what this program has resolved, or somebody's attempt."""
    for text in _strings(values):
        if "${" in text:
            raise ConfigError(
                f"{source}: its stored configuration has {text!r}, expected plain values: nothing in it is resolved"
            )
    return OmegaConf.create(dict(values))


def _require_plain(layer: Any, source: object) -> None:
    for text in _strings(OmegaConf.to_container(layer, resolve=False)):
        if _RESOLVER.search(text):
            raise ConfigError(
                f"{source}: has {text!r}, expected at most names of other fields in ${{...}}: the environment is not "
                "read; give the value as an override, which the shell completes: section.field=$NAME"
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _validate(values: Any, source: str) -> RunConfig:
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections with fields, found {type(values).__name__}")
    try:
        return RunConfig.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "\n".join(map(_explain, error.errors()))) from error


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back equal; replaces `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(to_yaml(config).encode())


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, which `load_config` reads back equal. What lies in run_dir as it does by
    default is written as `${run_dir}/...`: with another run_dir the file is another run's configuration."""
    values = config.model_dump(mode="json")
    for (section, field), place in PLACES.items():
        if config.run_dir is not None and values[section][field] == f"{config.run_dir}/{place}":
            values[section][field] = f"${{run_dir}}/{place}"
    return yaml.safe_dump(values, sort_keys=False)


def _layers(config: str | Path, seen: tuple[Path, ...] = ()) -> list[Any]:
    """The file and, before it, what it builds on."""
    path = Path(config)
    if not path.is_file():
        path = _PRESETS / f"{config}.yaml"
        if not path.is_file():
            raise ConfigError(f"{config}: neither a file nor a preset; the presets are {', '.join(preset_names())}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    layer = OmegaConf.load(path)
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{path}: expected sections with fields, found a list")
    _require_plain(layer, path)
    base = layer.pop("base", None)
    if base is None:
        return [layer]
    beside = path.parent / str(base)
    return [*_layers(beside if beside.is_file() else str(base), (*seen, path.resolve())), layer]


def _tuples(values: dict[Any, Any]) -> dict[Any, Any]:
    """YAML has lists only; the one tuple of the schema is strict about it."""
    training = values.get("training")
    if isinstance(training, dict) and isinstance(training.get("rampup_batch_size"), list):
        training = {**training, "rampup_batch_size": tuple(training["rampup_batch_size"])}
        return {**values, "training": training}
    return values


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("constrained", "literal")))
    if error["type"] == "extra_forbidden":
        parent: Any = RunConfig
        listed: Any = None
        for part in error["loc"][:-1]:
            annotation = get_args(listed)[0] if isinstance(part, int) else parent.model_fields[part].annotation
            listed = annotation  # of a list the next part is a number, and its items' class is the parent
            parent = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else parent
        close = difflib.get_close_matches(str(error["loc"][-1]), parent.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(parent.model_fields)}"
        return f"{where}: unknown field; {hint}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return f"{where}: {error['msg']}, found {error['input']!r}"
