"""Where a tokenizer's file is: named itself, in a directory, or by the name of a repository of the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from illada_megatron.data.errors import DataError

NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model")
"""Of a tokenizer's file in a directory or a repository, in the order in which they are taken."""
BESIDE = ("tokenizer_config.json", "chat_template.jinja")
"""Files that chat templates are read from."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SECONDS = 20.0


def find_tokenizer(name: str | Path, option: str = "data.tokenizer_path") -> Path:
    """The file of the tokenizer `name`: a `.model` (SentencePiece) or `.json` (Hugging Face), a directory with one, or
    `org/name` on the Hugging Face hub, from the cache of huggingface_hub where it is (HF_HOME, HF_HUB_CACHE), else from
    the network (not with HF_HUB_OFFLINE). What is in the cache is taken as it is: a new revision on the hub is not
    looked for.

    option: that gave the name, for messages. Raises DataError, which says what was tried."""
    path = Path(name)
    if path.is_file():
        if path.suffix in (".model", ".json"):
            return path
        raise DataError(
            f"{path}: the name ends in {path.suffix!r}, expected `.model` (SentencePiece) or `.json` (a Hugging Face "
            f"tokenizer.json): correct {option}"
        )
    if path.is_dir():
        return _in_directory(path, option)
    if path.suffix not in (".model", ".json") and _HUB_NAME.fullmatch(str(name)):
        return _of_hub(str(name), option)
    raise DataError(
        f"{path}: no such file or directory, expected a tokenizer: a `.model` or tokenizer.json, a directory with one, "
        f"or org/name on the Hugging Face hub: correct {option}"
    )


def _in_directory(directory: Path, option: str) -> Path:
    found = next((file for name in NAMES if (file := directory / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{directory}: a directory without {_either(NAMES)}, found {there}: give a directory that has one of them, "
            f"or the file itself, in {option}"
        )
    return found


def _of_hub(name: str, option: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    cached = (huggingface_hub.try_to_load_from_cache(name, file) for file in NAMES)
    found = next((Path(path) for path in cached if isinstance(path, str)), None)
    if found is not None:
        return found
    tried = f"no file or directory, and not in the cache of huggingface_hub ({constants.HF_HUB_CACHE})"
    todo = f"correct {option}, or fetch it where there is a network: hf download {name} {NAMES[0]} {BESIDE[0]}"
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{name}: {tried}; the hub was not asked, HF_HUB_OFFLINE is set: {todo}")
    try:
        return _downloaded(huggingface_hub, name)
    except DataError:
        raise
    except Exception as error:  # what the library raises is its HTTP client's, which changes with its versions
        raise DataError(f"{name}: {tried}; the hub ({constants.ENDPOINT}) says: {error}: {todo}") from error


def _downloaded(hub: Any, name: str) -> Path:
    """One question for the names of all files: it fails at once without a network, where each download tries again."""
    there = {one.rfilename for one in hub.HfApi().model_info(name, timeout=_HUB_SECONDS).siblings or ()}
    file = next((one for one in NAMES if one in there), None)
    if file is None:
        raise DataError(f"{name}: the repository on the Hugging Face hub has no {_either(NAMES)}: name another one")
    for beside in there.intersection(BESIDE):
        hub.hf_hub_download(name, beside)
    return Path(hub.hf_hub_download(name, file))


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
