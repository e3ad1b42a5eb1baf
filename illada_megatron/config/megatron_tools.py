"""What tools/ take of the options of Megatron-LM's tools of the same purpose, beyond those that mean the same.

Read in Megatron-LM's tools/preprocess_data.py, tools/merge_datasets.py and tools/checkpoint/ as of July 2024 and August
2026, and in older ones for what was removed since (--dataset-impl).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolOption:
    """An option of Megatron's that the tool itself does not have."""

    tools: str
    """Of tools/, without .py."""
    names: str
    says: str = ""
    """Why it has no meaning here; where it `stops`, what to do."""
    becomes: str | None = None
    """The option with the same meaning; a number: its values are arguments, in that order."""
    stops: bool = False
    """Going on without it would give something else than was asked for."""
    takes: int | None = 1
    """Words behind it; None: all up to the next option."""
    harmless: tuple[str, ...] = ()
    """Values that say what is done in any case."""


_PREPROCESS = "preprocess_data"
_CHECKPOINTS = "reshard_checkpoint convert_checkpoint"
_MODELS = "the model's: `illada translate` writes it into the run's configuration"
_FORMAT = "mmap (.bin/.idx) is the only format: give mmap, or leave it out"
_FILE_SAYS = "a tokenizer is what its file says"
TOOL_OPTIONS = [
    ToolOption(_PREPROCESS, "--partitions --files-per-process", "workers share shards: --workers, --shard-mb"),
    ToolOption(_PREPROCESS, "--keep-sequential-samples", "documents keep their order in any case", takes=0),
    ToolOption(
        _PREPROCESS,
        "--split-sentences",
        "sequences of single sentences are BERT's, and the model here reads whole documents: leave it out",
        stops=True,
        takes=0,
    ),
    ToolOption(_PREPROCESS, "--keep-newlines", "newlines are kept in any case", takes=0),
    ToolOption(_PREPROCESS, "--lang", "documents are not split into sentences"),
    ToolOption(_PREPROCESS, "--dataset-impl", _FORMAT, stops=True, harmless=("mmap", "infer")),
    ToolOption(_PREPROCESS, "--find-optimal-num-workers", "all cores are used; --workers for fewer", takes=0),
    ToolOption(_PREPROCESS, "--workers-to-check --max-documents", "numbers of workers are not tried out", takes=None),
    ToolOption(
        _PREPROCESS,
        "--vocab-size --padded-vocab-size --make-vocab-size-divisible-by --vocab-extra-ids "
        "--tensor-model-parallel-size --null-tokenizer-eod-id --null-tokenizer-pad-id",
        _MODELS,
    ),
    ToolOption(_PREPROCESS, "--no-pad-vocab-size --disable-pad-vocab-size", _MODELS, takes=0),
    ToolOption(
        _PREPROCESS,
        "--tokenizer-special-tokens --tokenizer-metadata --tiktoken-pattern --tiktoken-num-special-tokens",
        f"{_FILE_SAYS}: write special tokens and patterns into it",
        stops=True,
        takes=None,
    ),
    ToolOption(
        _PREPROCESS,
        "--tokenizer-sentencepiece-legacy --tokenizer-hf-no-use-fast --tokenizer-hf-no-include-special-tokens "
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces --trust-remote-code",
        f"{_FILE_SAYS}, and no code of others is run",
        takes=0,
    ),
    ToolOption(_PREPROCESS, "--use-gigatoken", "--tokenizer-engine auto takes the fastest that agrees", takes=0),
    ToolOption("merge_datasets", "--multimodal", "shards of text only: leave it out", stops=True, takes=0),
    ToolOption("merge_datasets", "--dataset-impl", _FORMAT, stops=True, harmless=("mmap", "infer")),
    ToolOption("merge_datasets", "--workers", "the disk bounds it"),
    ToolOption(
        "train_tokenizer",
        "--tokenizer-type",
        "SentencePiece is trained: leave it out",
        stops=True,
        harmless=("SentencePieceTokenizer", "GPTSentencePieceTokenizer"),
    ),
    ToolOption("train_tokenizer", "--output-prefix --model-prefix", "give --output NAME.model", stops=True),
    ToolOption("train_tokenizer", "--workers", "SentencePiece takes four threads"),
    ToolOption("inspect_dataset", "--input --data-path --path-prefix", becomes="1", takes=None),
    ToolOption("inspect_dataset", "--tokenizer-type", "known by the name of --tokenizer-model"),
    ToolOption(_CHECKPOINTS, "--load-dir --load", becomes="1"),
    ToolOption(_CHECKPOINTS, "--save-dir --save", becomes="2"),
    ToolOption("reshard_checkpoint", "--target-tensor-parallel-size --tensor-model-parallel-size", becomes="--tp"),
    ToolOption("reshard_checkpoint", "--target-pipeline-parallel-size --pipeline-model-parallel-size", becomes="--pp"),
    ToolOption("reshard_checkpoint", "--saver-transformer-impl", becomes="--transformer-impl"),
    ToolOption("reshard_checkpoint", "--saver --ckpt-format", "Megatron's mp_rank_... are written by --format legacy"),
    ToolOption(
        "reshard_checkpoint",
        "--target-expert-parallel-size --expert-model-parallel-size",
        "there are no experts: leave it out",
        stops=True,
        harmless=("1",),
    ),
    ToolOption(
        "convert_checkpoint",
        "--target-tensor-parallel-size --target-pipeline-parallel-size --target-expert-parallel-size",
        "a checkpoint fits any layout",
    ),
    ToolOption("convert_checkpoint", "--saver --saver-transformer-impl", "to-hf and from-hf say what is written"),
    ToolOption("convert_checkpoint", "--tokenizer-model", "to-hf has --tokenizer; runs have data.tokenizer_path"),
    ToolOption(_CHECKPOINTS, "--model-type", "GPT's layers alone are known", stops=True, harmless=("GPT",)),
    ToolOption(
        _CHECKPOINTS,
        "--loader --checkpoint-type --model-size --loader-transformer-impl --true-vocab-size --vocab-file "
        "--padded-vocab-size --make-vocab-size-divisible-by --position-embedding-type --params-dtype",
        "what is read says it",
    ),
    ToolOption(_CHECKPOINTS, "--megatron-path --max-queue-size", "megatron-core is a package, and there is no queue"),
    ToolOption(_CHECKPOINTS, "--no-checking --bf16 --fp16", "all is checked, and keeps its type", takes=0),
]


def tool_options(tool: str) -> dict[str, ToolOption]:
    """Of one tool, by name."""
    return {name: one for one in TOOL_OPTIONS if tool in one.tools.split() for name in one.names.split()}
