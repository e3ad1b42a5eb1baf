"""What this program reads of strangers' files, one function a format: bytes in, and what must not happen is watched.

A file is taken, or refused with an error for users; it opens no other file for writing, starts no process, runs no code
that it brings, leaves the classes of this process as they were, and takes no more memory than its size explains.
`test_formats.py` tries some mutations in the suite, `run_formats.py` many with atheris.
"""

import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.integrity import damage
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.metadata import Piece, TensorInfo, pickled_metadata
from illada_megatron.checkpoint.files.restricted_unpickler import data_offset, load_plain
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.hugging_face.config_json import CONFIG, model_config, read_config_json
from illada_megatron.checkpoint.hugging_face.safetensors_files import INDEX, SINGLE, SafetensorsReader
from illada_megatron.checkpoint.store import RECORD, CheckpointInfo, _own_checksum, read_record
from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.config.load import to_yaml
from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chat import ChatRenderer
from illada_megatron.data.preprocessing.chat_template import BadConversation, ChatTemplate, load_chat_template
from illada_megatron.data.shards.manifest import parse_manifest
from illada_megatron.data.shards.shard_list import list_shards

MOST_BYTES = 384 << 20
"""By which the peak of memory may grow for an input; most of it is what libraries keep."""
_LARGEST_READ = 1 << 20  # elements of a tensor that are read
_FORBIDDEN = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pickle.find_class", "urllib.", "webbrowser.")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLASSES: tuple[Any, ...] = (
    *(pathlib.PosixPath, pathlib.Path, torch.Size, torch.serialization._get_layout, OrderedDict, set, torch.dtype),
    *(torch.Tensor, TensorInfo, Piece, CheckpointInfo),
)


class Misbehaviour(BaseException):
    """A find; no error of the code that is tried, so that this does not take it for one."""


@dataclass(frozen=True)
class Format:
    """Something that is read."""

    seeds: Callable[[], dict[str, bytes]]
    read: Callable[[bytes, Path], None]
    """With a folder of its own to write the bytes into."""
    errors: tuple[type[Exception], ...]
    """For users."""
    words: tuple[bytes, ...] = ()
    """That mutations may put in."""
    runs_code: bool = False
    """By its nature: a template is compiled."""


def try_input(name: str, content: bytes, folder: Path) -> bool:
    """Whether the format `name` takes `content`. Raises Misbehaviour, and any error that is not for users."""
    form = FORMATS[name]
    before, peak = _attributes(), _peak_bytes()
    try:
        with _watched(form.runs_code, folder):
            form.read(content, folder)
        taken = True
    except form.errors:
        taken = False
    if _attributes() != before:
        raise Misbehaviour(f"attributes of this process's classes have changed: {_changes(before)}")
    if (grown := _peak_bytes() - peak) > MOST_BYTES + 64 * len(content):
        raise Misbehaviour(f"the peak of memory has grown by {grown:,} bytes for {len(content):,}")
    return taken


_active: tuple[bool, Path] | None = None


@contextmanager
def _watched(runs_code: bool, folder: Path) -> Iterator[None]:
    global _active
    _active = (runs_code, folder)
    try:
        yield
    finally:
        _active = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is None:
        return
    runs_code, folder = _active
    path = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes | os.PathLike) else ""
    if path.startswith(str(folder)):
        return
    if event == "open" and path:
        _, mode, flags = arguments
        writes = (flags or 0) & _WRITING or set(mode or "") & set("wax+")
        if writes or not path.startswith(_LIBRARIES):
            raise Misbehaviour(f"opens {path}, mode {mode}, flags {flags}")
    elif event == "exec":
        file = arguments[0].co_filename
        if not runs_code and not file.startswith(("/", "<frozen")):
            raise Misbehaviour(f"runs {file}")
    elif event.startswith(_FORBIDDEN) and event not in _ALLOWED:
        raise Misbehaviour(f"{event} {arguments}")


# what is loaded when it is needed, and what malloc and torch ask the system
_LIBRARIES = (
    *(sys.prefix, sys.base_prefix, "/usr/", "/proc/", "/sys/"),
    *(str(Path(file).resolve().parents[1]) for file in (torch.__file__, os.__file__, load_config.__code__.co_filename)),
)
sys.addaudithook(_audit)


def _attributes() -> list[frozenset[str]]:
    return [frozenset(getattr(one, "__dict__", {})) for one in _CLASSES]


def _changes(before: list[frozenset[str]]) -> list[str]:
    now = zip(_CLASSES, before, _attributes(), strict=True)
    return [f"{one}: {sorted(old ^ new)}" for one, old, new in now if old != new]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _metadata_seeds() -> dict[str, bytes]:
    pieces = [Piece((row, 0), (2, 3), "__0_0.distcp", 0, 1200) for row in (0, 2)]
    ours = pickled_metadata({"w": TensorInfo((4, 3), torch.float32, pieces)})
    return {"ours": ours, "protocol 2": pickle.dumps(pickle.loads(ours), protocol=2), "a call": _BUILD}


_BUILD = b"\x80\x02cpathlib\nPosixPath\nN}X\x01\x00\x00\x00aI1\ns\x86b."
_PICKLE_WORDS = (
    *(b"cpathlib\nPosixPath\n", b"ctorch\nSize\n", b"ctorch.serialization\n_get_layout\n", b"cos\nsystem\n"),
    *(b"cbuiltins\nset\n", b"ccollections\nOrderedDict\n", b"ctorch\nfloat32\n", b"cbuiltins\neval\n", b")R", b")\x81"),
    *(b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"N}X\x01\x00\x00\x00aI1\ns\x86b", b"}b", b"N\x86b"),
    *(b"ctorch.distributed.checkpoint.filesystem\nos.system\n", b"\x85R", b"\x86R", b"(", b"t", b"\x93", b"\x92", b"2"),
    *(b"\x8c\x0b__setstate__", b"\x8c\x09__class__", b"r\xff\xff\xff\x07", b"p99999999\n", b"Q", b"P1\n", b"\x82\x01"),
)


def _saved(value: Any) -> bytes:
    blob = io.BytesIO()
    torch.save(value, blob)
    return blob.getvalue()


_BLOB = _saved(torch.ones(2, 3)).ljust(1200, b"\0")


def _read_metadata(content: bytes, folder: Path) -> None:
    (folder / ".metadata").write_bytes(content)
    (folder / "__0_0.distcp").write_bytes(_BLOB)
    reader = TensorReader(folder)
    for name, info in reader.tensors.items():
        if info.nbytes < _LARGEST_READ:
            reader.read(name)


def _legacy_seeds() -> dict[str, bytes]:
    from argparse import Namespace

    from illada_megatron.checkpoint.megatron.args import namespace

    state = {
        "args": namespace(RunConfig(), 1, 2, "local"),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"step": 1, "params": [0]}]},
    }
    return {"state": _saved(state), "small": _saved({"args": Namespace(a=1)})}


def _pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def _read_legacy_pickle(content: bytes, folder: Path) -> None:
    """The pickle in the archive: a changed bit of the archive itself only breaks its checksum."""
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        for number in range(4):
            archive.writestr(f"archive/data/{number}", bytes(24))
        archive.writestr("archive/version", b"3\n")
    _read_legacy(blob.getvalue(), folder)


def _read_legacy(content: bytes, folder: Path) -> None:
    file = folder / "model_optim_rng.pt"
    file.write_bytes(content)
    waiting, seen = [load_plain(file)], 0
    while waiting and seen < 1000:
        one, seen = waiting.pop(), seen + 1
        if isinstance(one, torch.Tensor):
            data_offset(one, file, "a tensor")
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one


def _safetensors_seeds() -> dict[str, bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [20], "data_offsets": [24, 64]},
    }
    return {"two": json.dumps(header).encode(), "none": b"{}"}


def _read_safetensors(content: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(len(content).to_bytes(8, "little") + content + bytes(64))
    reader = SafetensorsReader(folder)
    for name, stored in reader.tensors.items():
        size = torch.Size(stored.shape).numel() * stored.dtype.itemsize
        if not 8 + len(content) <= stored.start <= stored.start + size <= 8 + len(content) + 64:
            raise Misbehaviour(f"{name} lies outside of the file's data")
        if stored.shape:
            reader.rows(name, 0, stored.shape[0])


def _read_index(content: bytes, folder: Path) -> None:
    (folder / INDEX).write_bytes(content)
    (seed,) = [_safetensors_seeds()["two"]]
    (folder / "model-00001-of-00001.safetensors").write_bytes(len(seed).to_bytes(8, "little") + seed + bytes(64))
    SafetensorsReader(folder)


def _index_seeds() -> dict[str, bytes]:
    names = dict.fromkeys("ab", "model-00001-of-00001.safetensors")
    return {"index": json.dumps({"metadata": {"total_size": 64}, "weight_map": names}).encode()}


def _config_json_seeds() -> dict[str, bytes]:
    llama = {
        **{"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "rope_theta": 1e4},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
        **{"max_position_embeddings": 64, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
    }
    llada = {
        **{"model_type": "llada", "embedding_size": 100, "d_model": 32, "mlp_hidden_size": 48, "n_layers": 2},
        **{"n_heads": 4, "n_kv_heads": 2, "max_sequence_length": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
        **{"mask_token_id": 5, "multi_query_attention": None, "weight_tying": False},
    }
    return {"llama": json.dumps(llama).encode(), "llada": json.dumps(llada).encode()}


def _read_config_json(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    foreign = read_config_json(folder)
    model_config(folder / CONFIG, foreign.layout, {"mask_token_id": 0, **foreign.fields})


def _manifest_seeds() -> dict[str, bytes]:
    entry = {"path": "web_0", "dtype": "uint16", "tokens": 9, "documents": 2, "bin_xxh3_128": "0" * 32}
    whole = {
        "format": "illada-corpus",
        "version": 1,
        "vocab_size": 99,
        "tokenizer_sha256": "a",
        "shards": [entry, {**entry, "path": "b"}],
    }
    return {"manifest": json.dumps(whole).encode()}


def _read_manifest(content: bytes, folder: Path) -> None:
    parse_manifest(content, "a manifest")
    (folder / "m.json").write_bytes(content)
    list_shards([folder / "m.json"])


def _record_seeds() -> dict[str, bytes]:
    record = {
        "step": 2,
        "config": load_config("tiny").model_dump(mode="json"),
        "progress": {"consumed_samples": 8, "bad_steps": {"skipped_samples": [[1, 2]]}},
        "fingerprints": {},
        "versions": {"torch": "2"},
        "files": {".metadata": {"bytes": 2, "xxh3_128": "0"}, "a/b": {"bytes": 2, "xxh3_128": "0"}},
    }
    return {"record": json.dumps(record).encode()}


def _read_record(content: bytes, folder: Path) -> None:
    """As it is, and with the version and checksum that it should have: anyone can compute them."""
    path = folder / "step_00000002"
    (path / "a").mkdir(parents=True, exist_ok=True)
    for name in (".metadata", "a/b"):
        (path / name).write_bytes(b"xx")
    (path / RECORD).write_bytes(content)
    found = read_record(LocalFolder(path))
    if isinstance(found, CheckpointInfo):
        damage(found.path, found.files, checksums=True)
    try:
        record = json.loads(content)
        if not isinstance(record, dict):
            return
        record = {**record, "version": 3}
        record["checksum"] = _own_checksum({name: one for name, one in record.items() if name != "checksum"})
    except (ValueError, RecursionError, TypeError):
        return
    (path / RECORD).write_text(json.dumps(record))
    found = read_record(LocalFolder(path))
    if isinstance(found, CheckpointInfo):
        load_config(found.config, source="a record")


def _read_yaml(content: bytes, folder: Path) -> None:
    (folder / "run.yaml").write_bytes(content)
    os.environ["ILLADA_SECRET"] = "hunter2"
    try:
        config = load_config(folder / "run.yaml")
    except ConfigError as error:
        if "hunter2" in str(error):
            raise Misbehaviour(f"tells a secret: {error}") from error
        raise
    if "hunter2" in to_yaml(config):
        raise Misbehaviour("takes a secret along")


_TEMPLATE = (
    b"{%- for message in messages %}{%- if message.role not in ['user', 'assistant'] %}{{- raise_exception('no') }}"
    b"{%- endif %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}"
    b"{% macro f(n) %}{{ n }}{% endmacro %}{{ f(loop.index) }}{%- endfor %}{% set x = namespace(a=1) %}{{ x.a * 3 }}"
)


def _read_template(content: bytes, folder: Path) -> None:
    (folder / "t.jinja").write_bytes(content)
    template = load_chat_template(folder / "tokenizer.json", folder / "t.jinja")
    renderer = ChatRenderer(ChatTemplate(source=template.source, variables={"bos_token": "<s>"}), ["<s>"])
    renderer.render([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}])


_JSON_WORDS = (
    *(b"[" * 300, b'{"a":' * 300, b"9" * 5000, b"1e999", b"-1", b"18446744073709551616", b'"\\ud800"', b'"\\u0000"'),
    *(b"null", b"true", b"1.5", b'"../../x"', b'"/etc/hostname"', b"NaN", b"{}", b"[]", b'"\\u001b[2J"', b"0"),
    *(b'"${oc.env:HOME}"', b'"training":{"lr":', b'"shape":[0]', b'"dtype":"I64"', b"4611686018427387904"),
)
FORMATS = {
    "metadata": Format(_metadata_seeds, _read_metadata, (CheckpointError, OSError), _PICKLE_WORDS),
    "legacy": Format(
        lambda: {name: _pickle_of(content) for name, content in _legacy_seeds().items()},
        _read_legacy_pickle,
        (CheckpointError, OSError),
        (*_PICKLE_WORDS, b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"),
    ),
    "legacy_archive": Format(_legacy_seeds, _read_legacy, (CheckpointError, OSError), (b"PK\x01\x02", b"PK\x05\x06")),
    "safetensors": Format(_safetensors_seeds, _read_safetensors, (CheckpointError, OSError), _JSON_WORDS),
    "safetensors_index": Format(_index_seeds, _read_index, (CheckpointError, OSError), _JSON_WORDS),
    "config_json": Format(_config_json_seeds, _read_config_json, (CheckpointError, OSError), _JSON_WORDS),
    "manifest": Format(_manifest_seeds, _read_manifest, (DataError,), _JSON_WORDS),
    "record": Format(_record_seeds, _read_record, (CheckpointError, ConfigError), _JSON_WORDS),
    "configuration": Format(
        lambda: {"tiny": to_yaml(load_config("tiny")).encode(), "short": b"base: tiny\ntraining: {lr: 1e-3}\n"},
        _read_yaml,
        (ConfigError, OSError),
        (
            *(b"${oc.env:ILLADA_SECRET}", b"${training.lr}", b"${${a}:ILLADA_SECRET}", b"&a", b"*a", b"<<: *a", b"!!"),
            *(b"!!python/object/apply:os.system [x]", b"2001-99-99", b"base: ", b"base: run.yaml", b"[" * 300, b"???"),
            *(b"\\${", b"0x1", b"1_000", b".inf", b"!!binary ", b"!!set {a}", b"{" * 100, b": ", b"- "),
        ),
    ),
    "chat_template": Format(
        lambda: {"chatml": _TEMPLATE},
        _read_template,
        (DataError, ValueError, BadConversation),
        (
            *(b"{{ ''.__class__.__mro__ }}", b"{% for i in range(99999) %}", b"{% endfor %}", b"|attr('__class__')"),
            *(b"{{ 'x' * 10**9 }}", b"**", b"{% include '/etc/hostname' %}", b"{% import 'os' as o %}", b"cycler"),
            *(
                b"{% macro g() %}",
                b"{% endmacro %}",
                b"{{ self._TemplateReference__context }}",
                b" recursive",
                b"(" * 99,
            ),
            *(
                b"|format(1)",
                b"|map('upper')|list",
                b"joiner",
                b"lipsum(9)",
                b"{% set y = [messages] %}",
                b"{% break %}",
            ),
        ),
        runs_code=True,
    ),
}


class InFolder:
    """Inputs one after the other, each in an empty folder in memory."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def __call__(self, content: bytes) -> bool:
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return try_input(self._name, content, self._folder)

    def close(self) -> None:
        shutil.rmtree(self._folder)
