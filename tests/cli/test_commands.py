"""Every command as a user types it: what it prints, what it leaves behind."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from launch import Illada, run_warm

from illada_megatron.config import load_config
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

COMMANDS = (
    *("train", "evaluate", "generate", "preprocess", "tokenizer", "sample", "convert", "runs", "plan", "translate"),
    "doctor",
)


@pytest.fixture(scope="module")
def corpus_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules of the standard library, one document each."""
    sources = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    return path


@pytest.fixture(scope="module")
def tokenizer_path(corpus_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with bytes for what it has not seen."""
    return train_sentencepiece([corpus_jsonl], tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=400)


@pytest.fixture(scope="module")
def of_its_tokenizer(tokenizer_path: Path, tiny_run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the ids and the mask of `tokenizer_path`, which its configuration does not name."""
    from illada_megatron.training import train

    tokenizer, save_dir = load_tokenizer(tokenizer_path), tmp_path_factory.mktemp("of_its_tokenizer")
    ids = [f"model.vocab_size={tokenizer.vocab_size}", f"model.mask_token_id={tokenizer.mask_id}"]
    train(load_config(None, [*tiny_run, *ids, "training.exit_steps=1", f"checkpoint.save_dir={save_dir}"]))
    return save_dir


def test_help_lists_every_command(illada: Illada) -> None:
    outcome = illada("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\s+\w", outcome.out, re.MULTILINE), command


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "generate", "preprocess", "sample", "plan", "runs", "translate"]
)
def test_help_of_a_command_shows_an_example(command: str, illada: Illada) -> None:
    outcome = illada(command, "--help")
    assert outcome.code == 0
    assert f"illada {command} " in re.sub(r"\s+", " ", outcome.out)


def test_unknown_command_and_option(illada: Illada) -> None:
    assert illada("trian").code == 2
    assert "--nprocs" in illada("train", "--nprocs", "2").err


def test_dry_run_prints_what_a_run_would_read_and_starts_nothing(
    tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    save_dir = tmp_path / "checkpoints"
    arguments = [*tiny_run, f"checkpoint.save_dir={save_dir}", "parallel.tensor_model_parallel_size=2"]
    outcome = illada("train", "--dry-run", "--nproc", 4, "--config", "tiny", *arguments)
    assert outcome.code == 0
    text, table = re.split(r"^layout\s*$", outcome.out, maxsplit=1, flags=re.MULTILINE)
    assert load_config(yaml.safe_load(text)) == load_config("tiny", arguments)
    assert "tensor 2, pipeline 1, data 2" in table
    assert "4 sequences of 32 tokens = 128 tokens; 1 micro-batches of 2 a rank" in re.sub(r"[\s│]+", " ", table)
    assert not save_dir.exists()


def test_dry_run_refuses_a_layout(tiny_run: tuple[str, ...], illada: Illada) -> None:
    outcome = illada("train", "--dry-run", "--nproc", 3, *tiny_run)
    assert outcome.code == 2
    assert "training.global_batch_size 4 is not a multiple of" in outcome.err


def test_dry_run_shows_the_layout_of_each_number_of_machines(tiny_run: tuple[str, ...], illada: Illada) -> None:
    layouts = "parallel.layouts=[{tensor_model_parallel_size: 2}, {micro_batch_size: 1}]"
    outcome = illada("train", "--dry-run", "--nnodes", "1:4", *tiny_run, layouts)
    assert outcome.code == 0, outcome.err
    flat = re.sub(r"[\s│]+", " ", outcome.out)
    assert "chosen parallel.layouts[0] of 2, the first that fits" in flat
    for row in (
        "4 nodes tensor 2, pipeline 1, data 2; 1 micro-batches of 2 a rank",
        "2 to 3 nodes 2 work, the others wait as spares: tensor 2, pipeline 1, data 1; 2 micro-batches of 2 a rank",
        "1 nodes tensor 1, pipeline 1, data 1; 4 micro-batches of 1 a rank; a step takes 4.00 times as long as on 4",
    ):
        assert row in flat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nnodes", "two", "--rdzv-endpoint", "x:1"], "--nnodes two: expected N or MIN:MAX"),
        (["--nnodes", "3:2", "--rdzv-endpoint", "x:1"], "--nnodes 3:2: expected at least 1, and MIN not above MAX"),
        (["--nnodes", "2:3"], "--nnodes 2:3 needs --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "2", "--rdzv-endpoint", "x:1", "--rdzv-conf", "join_timeout"], "expected KEY=VALUE"),
        (["--nproc", "3"], "training.global_batch_size 4 is not a multiple of"),
    ],
)
def test_launch_refuses(arguments: list[str], message: str, tiny_run: tuple[str, ...], illada: Illada) -> None:
    outcome = illada("train", *arguments, *tiny_run)
    assert outcome.code == 2
    assert message in outcome.err


def test_ranks_of_srun_are_not_restarted_by_themselves(
    tiny_run: tuple[str, ...], illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task would train alone, all into the same folder."""
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1"}
    task |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    outcome = illada("train", "--max-restarts", 3, *tiny_run)
    assert outcome.code == 2
    assert "srun has started this rank" in outcome.err


def test_doctor_shows_what_is_there_and_what_is_missing(illada: Illada) -> None:
    outcome = illada("doctor")
    assert outcome.code == 0
    flat = re.sub(r"[\s│]+", " ", outcome.out)
    for part in ("torch", "megatron-core", "CUDA", "Transformer Engine", "Apex"):
        assert part in flat
    import torch

    assert torch.__version__ in flat
    if not torch.cuda.is_available():
        assert "CUDA missing: would bring" in flat
        assert "gloo" in flat


def _bound(output: str) -> tuple[float, float, int]:
    pattern = r"held-out bound (\S+) \+- (\S+) nats/token\n\d+ samples of the \S+ windows, (\S+) tokens"
    found = re.search(pattern, output)
    assert found, output
    return float(found[1]), float(found[2]), int(found[3].replace(",", ""))


def test_evaluate_gives_the_same_figures_in_every_layout(two_steps: Path, illada: Illada) -> None:
    """The checkpoint's bound belongs to the checkpoint: one rank, TP2 and PP2 read the same number."""
    alone = _bound(illada("evaluate", "--checkpoint", two_steps).out)
    assert alone[2] == 5 * 32
    for layout in ("tensor", "pipeline"):
        run = run_warm("evaluate", ["--checkpoint", two_steps, f"parallel.{layout}_model_parallel_size=2"], nproc=2)
        assert run.process.returncode == 0, run.output
        assert _bound(run.process.stdout) == pytest.approx(alone, abs=2e-4)


@pytest.mark.slow
def test_evaluate_takes_a_checkpoint_of_any_layout(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """Saved by four ranks at TP2 x PP2, read by one, by two in the stages that are asked for, by three, though they
    divide no batch, and by four."""
    saved = tmp_path / "checkpoints"
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    stop = ["training.exit_steps=1", "checkpoint.interval_steps=1", f"checkpoint.save_dir={saved}"]
    trained = run_warm("train", [*tiny_run, *layout, "parallel.sequence_parallel=true", *stop], nproc=4)
    assert trained.process.returncode == 0, trained.output
    alone = _bound(illada("evaluate", "--checkpoint", saved).out)
    for nproc, more in ((2, ["parallel.pipeline_model_parallel_size=2"]), (3, []), (4, [])):
        run = run_warm("evaluate", ["--checkpoint", saved, *more], nproc=nproc)
        assert run.process.returncode == 0, run.output
        assert _bound(run.process.stdout) == pytest.approx(alone, abs=2e-4)


def test_evaluate_distinguishes_checkpoints_and_initial_weights(
    two_steps: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """Training shows: initial weights are worst, two steps better than one; a single step's directory can be named."""
    initial = illada("evaluate", "--config", "tiny", *tiny_run)
    assert "initial weights: held-out bound" in initial.out
    one, two = (
        illada("evaluate", "--checkpoint", two_steps / "step_00000001"),
        illada("evaluate", "--checkpoint", two_steps),
    )
    assert _bound(initial.out)[0] > _bound(one.out)[0] > _bound(two.out)[0]
    more = illada("evaluate", "--checkpoint", two_steps, "validation.evaluate_samples=9")
    assert _bound(more.out)[2] == 9 * 32


def test_evaluate_wants_one_of_two(illada: Illada, two_steps: Path) -> None:
    for arguments in ([], ["--config", "tiny", "--checkpoint", two_steps]):
        outcome = illada("evaluate", *arguments)
        assert outcome.code == 2
        assert "give one of --checkpoint" in outcome.err


def test_preprocess_train_generate(
    corpus_jsonl: Path, tokenizer_path: Path, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """The whole path of a newcomer: text, shard, training, a continued text, a filled gap."""
    outcome = illada("preprocess", corpus_jsonl, "--output-prefix", tmp_path / "shard", "--tokenizer", tokenizer_path)
    assert outcome.code == 0, outcome.err
    documents = len(corpus_jsonl.read_text().splitlines())
    assert f"{documents} documents" in outcome.out
    assert "skipped 0 bad lines" in outcome.out
    assert IndexedDataset(tmp_path / "shard").num_documents == documents

    tokenizer, checkpoint = load_tokenizer(tokenizer_path), tmp_path / "checkpoints"
    vocabulary = [f"model.vocab_size={tokenizer.vocab_size}", f"model.mask_token_id={tokenizer.mask_id}"]
    data = [f"data.train_paths=[{tmp_path / 'shard'}]", f"data.tokenizer_path={tokenizer_path}"]
    trained = illada("train", *tiny_run, *vocabulary, *data, f"checkpoint.save_dir={checkpoint}")
    assert trained.code == 0, trained.err

    common = ["generate", "--checkpoint", checkpoint, "--plain", "--block-length", 4, "--steps", 2]
    prompt = "def loads("
    continued = illada(*common, "--prompt", prompt, "--gen-length", 8)
    assert continued.code == 0, continued.err
    assert continued.out.startswith(prompt)
    assert illada(*common, "--prompt", prompt, "--gen-length", 8).out == continued.out

    (tmp_path / "prompt.txt").write_text("def <mask:3>(self):")
    filled = illada(*common, "--prompt-file", tmp_path / "prompt.txt")
    assert filled.code == 0, filled.err
    assert filled.out.startswith("def ")
    assert filled.out.endswith("(self):\n")
    assert "<mask" not in filled.out

    shown = illada(
        *common[:3],
        "--prompt",
        prompt,
        "--gen-length",
        4,
        "--block-length",
        4,
        "--steps",
        2,
        "--svg",
        tmp_path / "a.svg",
    )
    assert shown.code == 0, shown.err
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_preprocess_does_not_wait_for_what_it_needs_not(
    corpus_jsonl: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    """torch takes a second and 150 MB, the configuration as long as Python itself."""
    code = "import sys\nfrom illada_megatron.cli.main import main\nmain()\n"
    arguments = ["preprocess", corpus_jsonl, "--output-prefix", tmp_path / "s", "--tokenizer", tokenizer_path]
    command = [sys.executable, "-X", "importtime", "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if "|" in line}
    assert "illada_megatron.data.preprocessing.produce_corpus" in imported
    assert not {"torch", "illada_megatron.config", "omegaconf"} & imported


def test_preprocess_counts_the_lines_it_skips(
    corpus_jsonl: Path, tokenizer_path: Path, tmp_path: Path, illada: Illada
) -> None:
    good = corpus_jsonl.read_text().splitlines()[:2]
    (tmp_path / "in.jsonl").write_text("\n".join([good[0], "{broken", '{"txt": "x"}', good[1]]))
    arguments = ["preprocess", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "s", "--tokenizer", tokenizer_path]
    refused = illada(*arguments)
    assert refused.code == 2
    assert "in.jsonl:2" in refused.err
    assert not (tmp_path / "s.bin").exists()
    skipped = illada(*arguments, "--skip-bad-lines")
    assert skipped.code == 0, skipped.err
    assert "2 documents" in skipped.out
    assert "skipped 2 bad lines (1 key missing, 1 not JSON)" in skipped.out
    assert f"bad lines: {tmp_path / 'in.jsonl'}:2, {tmp_path / 'in.jsonl'}:3\n" in skipped.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt, --prompt-file and --prompts"),
        (["--prompt", "x", "--steps", "0"], "steps"),
        (["--prompt", "x", "--remasking", "highest"], "remasking"),
        (["--prompt", "x"], "the run names no data.tokenizer_path: give its tokenizer with --tokenizer"),
        (["--prompt", "x", "--tokenizer", "nowhere.json"], "nowhere.json: no such file or directory"),
        (["--prompt", "x <mask:99999>", "--tokenizer", "TOKENIZER"], "model.max_sequence_length is 64"),
        (["--prompt", "x", "--tokenizer", "TOKENIZER"], "take"),  # 128 tokens to append by default, 64 at most
        (["--prompt-file", "nowhere.txt", "--tokenizer", "TOKENIZER"], "nowhere.txt"),
    ],
)
def test_generate_refuses(
    arguments: list[str], message: str, of_its_tokenizer: Path, tokenizer_path: Path, illada: Illada
) -> None:
    filled = [str(tokenizer_path) if argument == "TOKENIZER" else argument for argument in arguments]
    outcome = illada("generate", "--checkpoint", of_its_tokenizer, *filled)
    assert outcome.code == 2
    assert message in outcome.err
