"""What tests of disturbed runs share: a warm process that starts ranks, and what they train on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus import write_corpus
from faults.injection import library
from faults.training_run import MODULES
from fork_server import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    with ForkServer(MODULES, {"LD_PRELOAD": str(library())}) as server:
        yield server


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")
