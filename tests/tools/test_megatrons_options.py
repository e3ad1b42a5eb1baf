"""tools/ with Megatron's options as they are typed there from memory."""

import json
import runpy
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import typer
from launch import ROOT, Outcome

from illada_megatron.cli.checkpoint_commands import reshard
from illada_megatron.cli.megatrons_habits import converter_words, tool_app, understood
from illada_megatron.config import ConfigError
from illada_megatron.config.megatron_tools import TOOL_OPTIONS, tool_options
from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.tokenizers.byte_level import byte_level_bpe
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

Tool = Callable[..., Outcome]
TEXTS = ["def f(x):\n    return x", "  two  spaces", "Grüße, 世界 🙂\n\n", "<|endoftext|> as text"]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tool:
    """tool(name, *arguments) -> what tools/NAME.py does, in this process and in `tmp_path`."""

    def run(name: str, *arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        out, err = capfd.readouterr()
        return Outcome(exit_.value.code or 0, out, err)

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.jsonl, b.jsonl, t.model, and vocab.json and merges.txt of a byte-level BPE with <|endoftext|>."""
    directory = tmp_path_factory.mktemp("files")
    sources = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    texts = [*TEXTS, *(source.read_text() for source in sources)]
    for name in ("a", "b"):
        lines = [json.dumps({"text": text, "title": f"{name} {number}"}) for number, text in enumerate(texts)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    train_sentencepiece([directory / "a.jsonl"], directory / "t.model", vocab_size=400)
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train([str(source) for source in sources], vocab_size=600, special_tokens=["<|endoftext|>"])
    trained.save_model(str(directory))
    return directory


def _documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


def test_vocab_and_merges_give_the_librarys_ids(files: Path, tool: Tool, tmp_path: Path) -> None:
    """As GPT-2's README has it. The mask is one more id, and EOS is <|endoftext|>."""
    done = tool(
        *("preprocess_data", "--input", files / "a.jsonl", "--output-prefix", "my-gpt2"),
        *("--vocab-file", files / "vocab.json", "--tokenizer-type", "GPT2BPETokenizer"),
        *("--merge-file", files / "merges.txt", "--append-eod", "--workers", "1"),
    )
    assert done.code == 0, done.err
    reference = tokenizers.ByteLevelBPETokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    eos = reference.token_to_id("<|endoftext|>")
    texts = [json.loads(line)["text"] for line in (files / "a.jsonl").read_text().splitlines()]
    assert _documents(tmp_path / "my-gpt2") == [[*reference.encode(text).ids, eos] for text in texts]
    made = load_tokenizer(tmp_path / "my-gpt2.tokenizer.json")
    size = reference.get_vocab_size()
    assert (made.vocab_size, made.mask_id, made.eos_id) == (size + 1, size, eos)
    assert f"model.vocab_size={size + 1} model.mask_token_id={size}" in done.out
    assert [made.decode(made.encode(text)) for text in TEXTS] == TEXTS


def test_the_made_tokenizer_is_made_once(files: Path, tool: Tool, tmp_path: Path) -> None:
    command = ["preprocess_data", "--input", files / "a.jsonl", "--output-prefix", "x", "--append-eod"]
    command += ["--vocab-file", files / "vocab.json", "--merge-file", files / "merges.txt", "--workers", "1"]
    assert tool(*command).code == 0
    again = tool(*command)
    assert again.code == 0, again.err
    assert "everything was finished before" in again.out
    (tmp_path / "x.tokenizer.json").write_text("{}")
    other = tool(*command)
    assert other.code == 2
    assert "x.tokenizer.json was made of other files" in other.err


def test_files_that_are_no_byte_level_vocabulary(files: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match=r"254 of the 256 bytes have no id"):
        byte_level_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text("[")
    with pytest.raises(DataError, match="the library says"):
        byte_level_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(DataError, match="no such file"):
        byte_level_bpe(files / "vocab.json", tmp_path / "none.txt")


def test_several_words_behind_an_option(files: Path, tool: Tool, tmp_path: Path) -> None:
    done = tool(
        *("preprocess_data", "--input", files / "a.jsonl", files / "b.jsonl", "--json-keys", "text", "title"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", files / "t.model"),
        *("--output-prefix", "out", "--append-eod", "--workers", "1"),
    )
    assert done.code == 0, done.err
    titles, texts = (IndexedDataset(tmp_path / f"out_{key}_document") for key in ("title", "text"))
    assert titles.num_documents == texts.num_documents == 2 * len((files / "a.jsonl").read_text().splitlines())
    tokenizer = load_tokenizer(files / "t.model")
    assert tokenizer.decode(titles.document(0)[:-1]) == "a 0"


def test_what_has_no_meaning_is_said_and_changes_nothing(files: Path, tool: Tool, tmp_path: Path) -> None:
    common = ("--input", files / "a.jsonl", "--tokenizer-model", files / "t.model", "--output-prefix")
    extra = "--partitions 4 --keep-sequential-samples --dataset-impl mmap --log-interval 1000 --vocab-size 400"
    extra += " --find-optimal-num-workers --workers-to-check 4 8 --max-documents 100 --lang english"
    plain = tool("preprocess_data", *common, "plain", "--workers", "1", "--append-eod")
    done = tool("preprocess_data", *common, "same", "--workers", "1", *extra.split())
    assert (plain.code, done.code) == (0, 0), done.err
    assert "has no meaning here" not in plain.err
    for words in (
        "--partitions 4 has",
        "--keep-sequential-samples has",
        "--workers-to-check 4 8 has",
        "--lang english",
    ):
        assert words in done.err
    assert "--dataset-impl" not in done.err
    assert "documents end with EOS also without --append-eod" in done.err
    assert (tmp_path / "plain.bin").read_bytes() == (tmp_path / "same.bin").read_bytes()


# what is typed behind `--input a.jsonl --output-prefix out` -> words of the error
STOPS = {
    "--tokenizer-model t.model --split-sentences": "--split-sentences: sequences of single sentences are BERT's",
    "--tokenizer-model t.model --dataset-impl lazy": "--dataset-impl lazy: mmap (.bin/.idx) is the only format",
    "--vocab-file v.txt --tokenizer-type BertWordPieceLowerCase": "WordPiece loses case and spaces",
    "--tokenizer-type NullTokenizer --vocab-size 100": "it makes no ids of text",
    "--tokenizer-type TikTokenizer --tokenizer-model t.json": "a tiktoken vocabulary is not read",
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model t.model": "expects a file that ends in .json",
    "--tokenizer-type GPTBPE --tokenizer-model t.model": "--tokenizer-type is GPTBPE: no type of Megatron's",
    "--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json": "--merge-file None: expected the vocab.json",
    "--vocab-file vocab.json --merge-file merges.txt --tokenizer-model t.model": "are both given",
    "--append-eod": "no tokenizer: give --tokenizer",
    "--tokenizer-model t.model --tokenizer-special-tokens <a> <b>": "write special tokens and patterns into it",
    "--tokenizer-model t.model --json-key text --no-such-option": "No such option",
}


@pytest.mark.parametrize("typed", STOPS)
def test_what_would_give_other_data_stops(typed: str, files: Path, tool: Tool, tmp_path: Path) -> None:
    for name in ("a.jsonl", "t.model", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    done = tool("preprocess_data", "--input", "a.jsonl", "--output-prefix", "out", *typed.split())
    assert done.code == 2
    assert STOPS[typed] in done.err
    assert not list(tmp_path.glob("out*"))


def test_an_input_taken_for_a_key(files: Path, tool: Tool) -> None:
    done = tool("preprocess_data", "--output-prefix", "o", "--tokenizer", "t.model", "--json-keys", "text", "a.jsonl")
    assert done.code == 2
    assert "no input: name files, globs or directories; --json-keys took text a.jsonl: give --input FILE" in done.err


def test_merging_and_looking(files: Path, tool: Tool, tmp_path: Path) -> None:
    common = ("--tokenizer-model", files / "t.model", "--workers", "1", "--append-eod", "--output-prefix")
    for name in ("a", "b"):
        assert tool("preprocess_data", "--input", files / f"{name}.jsonl", *common, f"in/{name}").code == 0
    listed = tool("merge_datasets", "--input", "in/a", "in/b", "--output-prefix", "listed", "--dataset-impl", "mmap")
    folder = tool("merge_datasets", "--input=in", "--output-prefix", "folder")
    assert (listed.code, folder.code) == (0, 0), listed.err + folder.err
    assert (tmp_path / "listed.bin").read_bytes() == (tmp_path / "folder.bin").read_bytes()
    looked = tool("inspect_dataset", "--data-path", "in/a", "in/b", "--verify")
    assert looked.code == 0, looked.err
    assert "verified: 2 shards" in looked.out
    images = tool("merge_datasets", "--input", "in", "--output-prefix", "x", "--multimodal")
    assert images.code == 2
    assert "--multimodal: shards of text only" in images.err


def test_exit_codes(files: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2: the user can mend it; 1: the system may, another time; as `illada` ends."""
    assert tool("inspect_dataset", "nowhere.json").code == 2
    assert tool("merge_datasets", "--input", "nowhere", "--output-prefix", "x").code == 2
    assert tool("train_tokenizer", "--input", "nowhere.jsonl", "--output", "t.model").code == 2
    assert tool("reshard_checkpoint", "--load-dir", "nowhere", "--save-dir", "new").code == 2

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("illada_megatron.data.shards.shard_list.find_shards", broken)
    failed = tool("merge_datasets", "--input", "nowhere", "--output-prefix", "x")
    assert (failed.code, "Input/output error" in failed.err) == (1, True)


def test_training_a_tokenizer(files: Path, tool: Tool) -> None:
    inputs = ("--input", files / "a.jsonl", files / "b.jsonl")
    done = tool("train_tokenizer", *inputs, "--output", "n.model", "--vocab-size", "400", "--workers", "4")
    assert done.code == 0, done.err
    stopped = tool("train_tokenizer", *inputs, "--output-prefix", "n", "--vocab-size", "400")
    assert stopped.code == 2
    assert "give --output NAME.model" in stopped.err


def test_megatrons_checkpoint_converter(capfd: pytest.CaptureFixture[str]) -> None:
    """tools/checkpoint/convert.py's options are ours for the same."""
    params = typer.main.get_command(tool_app(reshard, "reshard_checkpoint")).params
    typed = "--model-type GPT --loader mcore --saver mcore --load-dir old --save-dir new --megatron-path /m --bf16 "
    typed += "--target-tensor-parallel-size 4 --target-pipeline-parallel-size=2 --saver-transformer-impl local"
    words = understood(typed.split(), params, "reshard_checkpoint")
    assert words == ["old", "new", "--tp", "4", "--pp", "2", "--transformer-impl", "local"]
    assert "--saver mcore has no meaning here: Megatron's mp_rank_... are written by --format" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="--target-expert-parallel-size 8: there are no experts"):
        understood(["--target-expert-parallel-size", "8"], params, "reshard_checkpoint")
    hugging_face = "--bf16 --model-type GPT --loader llama_mistral --saver mcore --checkpoint-type hf --load-dir llama "
    hugging_face += "--target-tensor-parallel-size 8 --save-dir start --tokenizer-model llama --model-size llama3"
    assert converter_words(hugging_face.split()) == ["from-hf", "llama", "start"]
    assert converter_words(["--loader", "mcore", "--saver", "llama_hf", "--load-dir", "a", "--save-dir", "b"]) == [
        "to-hf",
        "a",
        "b",
    ]
    assert converter_words(["to-hf", "a", "b", "--dtype", "fp32"]) == ["to-hf", "a", "b", "--dtype", "fp32"]
    with pytest.raises(ConfigError, match=r"neither is Hugging Face's.*tools/reshard_checkpoint\.py"):
        converter_words(["--loader", "megatron", "--saver", "mcore", "--load-dir", "a", "--save-dir", "b"])


def test_the_table_is_of_tools_that_are_there() -> None:
    assert {name for one in TOOL_OPTIONS for name in one.tools.split()} <= {
        p.stem for p in (ROOT / "tools").glob("*.py")
    }
    for name in ("preprocess_data", "convert_checkpoint"):
        assert tool_options(name)
