"""Shared fixtures."""

import gc
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from corpus import write_corpus
from launch import Illada, Outcome

from illada_megatron.cli.main import main
from illada_megatron.config import RunConfig, load_config
from illada_megatron.runtime import Runtime, runtime
from illada_megatron.runtime.loopback import quiet_port

_MANY_THREADS = 100


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the package and transformers remember for their user is not what other sessions left."""
    modules = str(tmp_path_factory.mktemp("modules"))  # one place: Python imports `transformers_modules` once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_MODULES_CACHE", modules)
        if "transformers" in sys.modules:  # it has looked at the environment already
            patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_heard() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and with them all programs they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def process_groups_end() -> Iterator[None]:
    """Each of gloo's groups has three threads that wake a hundred times a second, until nothing refers to it; models
    do, in cycles. After some hundred tests they would take most of the machine."""
    yield
    if psutil.Process().num_threads() > _MANY_THREADS:
        gc.collect()


@pytest.fixture
def illada(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Illada:
    """illada(*arguments) -> what `illada ARGUMENTS` does, in this process: an error that is not shown as a message
    fails the test with its traceback."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["illada", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return Outcome(exit_.value.code or 0, out, err)

    return run


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of a bucket on a real S3 server of this machine; the environment says where it is, as a user's would."""
    pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    port = quiet_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            _wait_for(endpoint, server)
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/illada-test", method="PUT"))
            yield "s3://illada-test"
        finally:
            server.terminate()
            server.wait()


def _wait_for(endpoint: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(endpoint)
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server ended with {server.returncode}")


TINY = (
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "data.sequence_length=48", "model.max_sequence_length=64"),
    *("training.precision=fp32", "training.micro_batch_size=2", "training.global_batch_size=4"),
)


@pytest.fixture(scope="module")
def tiny_config() -> RunConfig:
    """A model small enough to differentiate, with vocabulary padding (250 -> 256) and grouped queries."""
    return load_config("tiny", TINY)


@pytest.fixture(scope="module")
def single_process(tiny_config: RunConfig) -> Iterator[Runtime]:
    """A run of one rank in this process."""
    with runtime(tiny_config) as run:
        yield run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of `train`: a model of two layers on this package's sources, three steps of four samples."""
    directory = tmp_path_factory.mktemp("corpus")
    shard, held_out = write_corpus(directory / "shard"), write_corpus(directory / "held_out")
    return (
        *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
        *("model.num_query_groups=2", "model.vocab_size=250", "data.sequence_length=32"),
        *("model.max_sequence_length=64", "training.precision=fp32", "training.micro_batch_size=2"),
        *("training.global_batch_size=4", "training.train_steps=3", "training.lr=5e-3", "schedule.warmup_steps=0"),
        *("runtime.device=cpu", "runtime.num_threads=1"),
        *(f"data.train_paths=[{shard}]", f"data.validation_paths=[{held_out}]", "validation.num_samples=5"),
        "validation.evaluate_samples=5",
    )


@pytest.fixture(scope="session")
def two_steps(tiny_run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save_dir with the checkpoints of steps 1 and 2 of `tiny_run`; tests that change it work on a copy."""
    from illada_megatron.training import train

    save_dir = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    stop = ["training.exit_steps=2", "checkpoint.interval_steps=1", f"checkpoint.save_dir={save_dir}"]
    train(load_config(None, [*tiny_run, *stop]))
    return save_dir
