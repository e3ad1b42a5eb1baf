"""YAML presets and files plus dotted overrides -> one validated RunConfig: OmegaConf merges, pydantic checks.

`${section.field}` in a file or an override is the value of another field. Nothing reads the environment: with a
configuration from elsewhere, secrets would go to the places that it names. The shell puts variables into overrides.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from illada_megatron.config.field_names import hint_for, section_class
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
    source: what an error calls the configuration, but where an override is to blame; None: its path.
    Raises ConfigError.
    """
    source = source or (str(config) if isinstance(config, str | Path) else "the configuration")
    count = 0
    try:
        layers = _layers(config) if isinstance(config, str | Path) else [_stored(config or {}, source)]
        count = len(layers)
        layers += [_override(text) for text in overrides]
        values = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: {error}") from error
    try:
        return _validated(values)
    except ValidationError as error:
        lines = [f"{_blamed(one, overrides, layers[:count], source)}: {_explain(one)}" for one in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _override(text: str) -> Any:
    if "=" not in text:
        raise ConfigError(f"override {text!r}: expected section.field=value, as training.lr=1e-3")
    try:
        layer = OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {text!r}: {error}") from error
    _require_plain(layer, text)
    return layer


def _blamed(error: Any, overrides: Sequence[str], before: list[Any], source: str) -> str:
    """Who has to change: the override that sets the field; of what does not fit together, the overrides that are there
    where it fits without them (`before`: the layers without them); else what `source` says."""
    where = [str(part) for part in error["loc"]]
    for text in reversed(overrides):
        parts = text.partition("=")[0].split(".")
        inside = where[: len(parts)] == parts
        # of fields that do not fit together none is to blame alone
        if where and (inside or (parts[: len(where)] == where and error["type"] != "value_error")):
            return f"override {text!r}"
    if overrides:
        with suppress(OmegaConfBaseException, ValueError):  # pydantic's ValidationError is one
            _validated(OmegaConf.to_container(OmegaConf.merge(*before), resolve=True))
            return f"{source} with {' '.join(overrides)}"
    return source


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


def _validated(values: Any) -> RunConfig:
    return RunConfig.model_validate(_tuples(values) if isinstance(values, dict) else values)


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
        *outer, name = error["loc"]
        parent: Any = RunConfig
        for part in outer:
            if not isinstance(part, int):  # of a list the next part is a number
                parent = section_class(parent.model_fields[part].annotation)
        return f"{where}: unknown field; {hint_for(str(name), list(parent.model_fields))}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return f"{where}: {error['msg']}, found {error['input']!r}"
