"""A model of random weights, whose tokens are bytes and parts of words, behind a real server."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from served import Served, Serving
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from illada_megatron.generation import FunctionModel, Generator, Predict
from illada_megatron.serving.conversations import Conversations
from illada_megatron.serving.options import Options
from illada_megatron.serving.server import listening, serve
from tests.checkpoint.random_weights import random_checkpoint, small_config

VOCABULARY = 400
SPECIAL = ["<s>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>", "<mask>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = (
    *("model.hidden_size=64", "model.ffn_hidden_size=96", f"model.vocab_size={VOCABULARY}", "model.num_layers=2"),
    *("model.max_sequence_length=512", "training.precision=fp32"),
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/: a checkpoint; tokenizer.json, with a chat template beside it."""
    folder = tmp_path_factory.mktemp("served")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator([Path(__file__).read_text()] * 2, trainer)
    words.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, **names}))
    random_checkpoint(folder / "run", small_config(*SIZES))
    return folder


@pytest.fixture(scope="module")
def generator(place: Path) -> Iterator[Generator]:
    with Generator.open(place / "run", "cpu", place / "tokenizer.json") as opened:
        yield opened


@pytest.fixture(scope="module")
def serving(generator: Generator) -> Serving:
    """serving(a generator, **fields of Options) -> a server of its own. send_bytes: that the system may hold of what is
    sent to one client."""

    @contextmanager
    def started(of: Generator = generator, send_bytes: int | None = None, **options: object) -> Iterator[Served]:
        ready = threading.Event()
        ends: list[Callable[[], None]] = []

        def begun(end: Callable[[], None]) -> None:
            ends.append(end)
            ready.set()

        allowed = replace(Options("tiny", {"gen_length": 32, "block_length": 8, "steps": 8}), **options)
        chat = Conversations(of.tokenizer_path, None) if of.tokenizer_path else "the tokenizer is of no file"
        with listening("127.0.0.1", 0) as listener:
            if send_bytes is not None:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            thread = threading.Thread(target=serve, args=(of, allowed, chat, listener, begun))
            thread.start()
            assert ready.wait(60)
            try:
                yield Served(url, ends[0])
            finally:
                ends[0]()
                thread.join()

    return started


@pytest.fixture(scope="module")
def served(serving: Serving) -> Iterator[Served]:
    """One for all tests of a file that need nothing special."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def computed(generator: Generator) -> Callable[[Predict], Generator]:
    """computed(function of tokens [b, s]) -> a generator of that model."""

    def made(predict: Predict) -> Generator:
        return Generator(FunctionModel(predict, VOCABULARY), generator.tokenizer, generator.config)

    return made
