"""A pretrain_gpt.py command line as a configuration, with what becomes of each option (docs/from_megatron.md).

An option that is not given has Megatron's default, also where another is the default here. Source of Megatron's rules:
megatron/training/arguments.py (validate_args), megatron/core/optimizer_param_scheduler.py, megatron/core/
num_microbatches_calculator.py.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import yaml

from illada_megatron.config.field_names import field_paths
from illada_megatron.config.load import ConfigError, load_config
from illada_megatron.config.megatron_names import BYTE_LEVEL_BPE, HARMLESS, OPTIONS, REQUIRED, TOKENIZER_TYPES
from illada_megatron.config.megatron_options import Given
from illada_megatron.config.pipeline_split import UNEVEN_OPTIONS, megatron_layout, split_of_megatron, unrolled
from illada_megatron.config.schema import ScheduleConfig
from illada_megatron.config.schema.data import weighted_paths

GPT2_VOCAB_SIZE = 50257
_DIFFERS = "differs"
_COMPLETE = "to be completed"
_UNKNOWN = "not known, neither to Megatron-LM of 2024 nor of 2026"
GROUPS = (_COMPLETE, _DIFFERS, "contradicts masked diffusion", "not supported", "not needed here", _UNKNOWN)
"""Of the notes, what matters most first."""


@dataclass(frozen=True)
class Vocabulary:
    """Of the tokenizer that a command line names."""

    size: int
    """One more than the largest id."""
    mask_id: int | None


@dataclass
class Translation:
    """What a command line becomes."""

    given: Given
    fields: dict[str, Any] = field(default_factory=dict)
    """By `section.field`."""
    notes: dict[str, list[str]] = field(default_factory=lambda: {group: [] for group in GROUPS})

    def put(self, path: str, value: Any) -> bool:
        """Set a field, if the schema has it."""
        known = path in field_paths()
        if known:
            self.fields[path] = value
        return known

    def differs(self, text: str) -> None:
        self.notes[_DIFFERS].append(text)

    def yaml(self) -> str:
        """In the order of the schema; what is to be completed stands above it."""
        said: dict[str, Any] = {}
        for path in field_paths():
            if path in self.fields:
                section, _, name = path.rpartition(".")
                (said.setdefault(section, {}) if section else said)[name] = self.fields[path]
        todo = "".join(f"# {_COMPLETE}: {text}\n" for text in self.notes[_COMPLETE])
        return todo + yaml.safe_dump(said, sort_keys=False)


def translate(given: Given, vocabulary: Vocabulary | None = None) -> Translation:
    """Raises ConfigError: what Megatron would ask for too is missing, or the configuration is none."""
    done = Translation(given)
    missing = [name for name in REQUIRED if name not in given.values]
    if not {"--train-iters", "--train-samples"} & given.values.keys():
        missing.append("--train-iters or --train-samples")
    for option in OPTIONS:
        if option.field is None or option.computed:
            continue
        if option.name not in given.values:
            if option.has_default:
                done.put(option.field, option.default)
            continue
        value = given.values[option.name]
        if not done.put(option.field, value) and str(value) not in HARMLESS.get(option.name, ()):
            done.notes[option.group].append(f"{option.name}: {option.note}")
    _parallel(done)
    if _batch_size(done) is None:
        missing.append("--global-batch-size (or torchrun's --nproc_per_node before pretrain_gpt.py)")
    if missing:
        raise ConfigError(f"the command line lacks {', '.join(missing)}")
    _model(done)
    _vocabulary(done, vocabulary)
    _training(done)
    _schedule(done)
    _data(done)
    _checkpoints(done)
    _report(done)
    load_config(yaml.safe_load(done.yaml()), source="the command line, translated,")
    return done


def _model(done: Translation) -> None:
    given, fields = done.given, done.fields
    hidden = given.get("--hidden-size")
    gated = int(4 * hidden * 2 / 3) // 64 * 64  # Megatron's for --swiglu
    done.put("model.ffn_hidden_size", given.get("--ffn-hidden-size", gated))
    grouped = given.get("--group-query-attention")
    heads = given.get("--num-attention-heads")
    done.put("model.num_query_groups", given.get("--num-query-groups", 1) if grouped else heads)
    done.put("model.max_sequence_length", given.get("--max-position-embeddings", given.get("--seq-length")))
    done.put("model.tie_word_embeddings", not given.get("--untie-embeddings-and-output-weights"))
    std = fields.get("model.init_method_std", 0.02)
    done.put("model.embedding_init_std", given.get("--embedding-init-method-std", std))
    if not given.get("--swiglu"):
        size = fields["model.ffn_hidden_size"]
        done.differs(f"without --swiglu Megatron's MLP has two matrices; here SwiGLU's three, ffn_hidden_size {size}")
    if given.get("--normalization", "LayerNorm") != "RMSNorm":
        done.differs("--normalization LayerNorm (Megatron's default): RMSNorm here")
    if not given.get("--disable-bias-linear"):
        done.differs("without --disable-bias-linear Megatron's linear layers have biases; here none has")
    position = given.get("--position-embedding-type", "learned_absolute")
    if position != "rope" and not given.get("--use-rotary-position-embeddings"):
        done.differs(f"--position-embedding-type {position}: rope here")
    for name in ("--attention-dropout", "--hidden-dropout"):
        if given.get(name, 0.1):
            done.differs(f"{name} {given.get(name, 0.1)}{'' if name in given.values else ' (the default)'}: 0 here")
    _rope_scaling(done)


def _rope_scaling(done: Translation) -> None:
    """Llama 3.1's numbers, as megatron/core/models/common/embeddings/rotary_pos_embedding.py has them."""
    if not done.given.get("--use-rope-scaling"):
        return
    scaling = {
        "rope_type": "llama3",
        "factor": done.given.get("--rope-scaling-factor", 8.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not done.put("model.rope_scaling", scaling):
        done.notes["not supported"].append("--use-rope-scaling: rotary frequencies are not scaled")


def _parallel(done: Translation) -> None:
    given = done.given
    tp, pp = given.get("--tensor-model-parallel-size", 1), given.get("--pipeline-model-parallel-size", 1)
    each = given.get("--num-layers-per-virtual-pipeline-stage")
    if each is not None and "--num-layers" in given.values:
        layers = given.get("--num-layers")
        if layers % (pp * each):
            raise ConfigError(
                f"--num-layers {layers} is not a multiple of --pipeline-model-parallel-size {pp} * "
                f"--num-layers-per-virtual-pipeline-stage {each}"
            )
        done.put("parallel.virtual_pipeline_model_parallel_size", layers // pp // each)
    _stages(done, pp)
    if given.get("--sequence-parallel"):
        done.put("parallel.sequence_parallel", tp > 1)
    if given.get("--overlap-grad-reduce") and "--ddp-bucket-size" in given.values:
        done.put("parallel.ddp_bucket_size", given.get("--ddp-bucket-size"))
    if given.get("--tp-comm-overlap") and given.get("--sequence-parallel") and tp > 1 and given.get("--bf16"):
        done.put("parallel.tp_comm_overlap", not given.get("--deterministic-mode"))
    if given.get("--use-distributed-optimizer"):
        in_bf16 = given.get("--grad-reduce-in-bf16", False)
        done.put("parallel.grad_reduce_in_bf16", in_bf16)
        done.put(
            "parallel.ddp_pad_buckets_for_high_nccl_busbw", given.get("--ddp-pad-buckets-for-high-nccl-busbw", False)
        )
        done.put("parallel.ddp_average_in_collective", given.get("--ddp-average-in-collective", False) and not in_bf16)
    else:
        done.put("parallel.ddp_average_in_collective", given.get("--ddp-average-in-collective", False))


def _stages(done: Translation, pp: int) -> None:
    """Stages with unlike numbers of layers."""
    given, size = done.given, "parallel.virtual_pipeline_model_parallel_size"
    written = given.get("--pipeline-model-parallel-layout")
    if written is not None:
        done.put("parallel.pipeline_layout", written)
        done.put(size, max(1, (unrolled(written).count("|") + 1) // pp))
        return
    asked = {name: value for name in UNEVEN_OPTIONS if (value := given.get(f"--{name.replace('_', '-')}"))}
    if asked and "--num-layers" in given.values:
        try:
            split = split_of_megatron(given.get("--num-layers"), pp, done.fields.get(size, 1), asked)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        done.put("parallel.pipeline_layout", megatron_layout(split))


def _batch_size(done: Translation) -> int | None:
    given = done.given
    batch = given.get("--global-batch-size")
    if batch is None and given.ranks is not None:
        tp, pp = given.get("--tensor-model-parallel-size", 1), given.get("--pipeline-model-parallel-size", 1)
        batch = given.ranks // (tp * pp * given.get("--context-parallel-size", 1)) * given.get("--micro-batch-size", 1)
    if batch is not None:
        done.put("training.global_batch_size", batch)
    return batch


def _vocabulary(done: Translation, vocabulary: Vocabulary | None) -> None:
    """The mask is one of the tokenizer's ids or a row behind them, as `illada convert from-hf` makes it."""
    given = done.given
    kind = given.get("--tokenizer-type", "GPT2BPETokenizer" if "--merge-file" in given.values else "")
    file = TOKENIZER_TYPES.get(kind, ())
    if file == BYTE_LEVEL_BPE:
        done.notes[_COMPLETE].append(
            "data.tokenizer_path: the PREFIX.tokenizer.json that tools/preprocess_data.py makes of --vocab-file and "
            "--merge-file"
        )
        vocabulary = vocabulary or Vocabulary(GPT2_VOCAB_SIZE, None)
    elif isinstance(file, str):
        done.notes["not supported"].append(f"--tokenizer-type {kind}: {file}")
    elif "--tokenizer-model" in given.values:
        done.put("data.tokenizer_path", given.get("--tokenizer-model"))
    if vocabulary is None and "--vocab-size" in given.values:
        vocabulary = Vocabulary(given.get("--vocab-size"), None)
    if vocabulary is None:
        done.notes[_COMPLETE].append(
            "model.vocab_size and model.mask_token_id: the tokenizer's, whose file is not here"
        )
        return
    has_mask = vocabulary.mask_id is not None
    done.put("model.vocab_size", vocabulary.size + (0 if has_mask else 1))
    done.put("model.mask_token_id", vocabulary.mask_id if has_mask else vocabulary.size)
    if not has_mask:
        done.differs(f"a vocabulary of {vocabulary.size} has no mask: id {vocabulary.size}, one more row, is the mask")


def _training(done: Translation) -> None:
    given = done.given
    batch = done.fields["training.global_batch_size"]
    ramp = given.get("--rampup-batch-size")
    if ramp is not None:
        if len(ramp) != 3 or not all(text.isdecimal() and int(text) > 0 for text in ramp):
            raise ConfigError(f"--rampup-batch-size is {' '.join(ramp)}, expected three whole numbers above 0")
        done.put("training.rampup_batch_size", [int(text) for text in ramp])
    elif "--step-batch-size-schedule" in given.values:
        _stepwise(done, given.get("--step-batch-size-schedule"))
    if "--train-samples" in given.values:
        done.put("training.train_steps", _steps(done, given.get("--train-samples")))
    _precision(done)
    if given.get("--recompute-activations"):
        done.put("training.recompute", "selective")
    if given.get("--checkpoint-activations"):
        done.put("training.recompute", "full")
    if "--exit-interval" in given.values:
        done.differs("--exit-interval: training.exit_steps is this step alone, not its multiples")
    if "training.rampup_batch_size" in done.fields:
        done.differs(f"while the batch grows to {batch} the learning rate goes by steps, in Megatron by samples")


def _precision(done: Translation) -> None:
    given = done.given
    half, fp8 = given.get("--bf16") or given.get("--fp16"), given.get("--fp8-format")
    done.put("training.precision", "fp8" if fp8 else "bf16" if half else "fp32")
    if given.get("--fp16"):
        done.differs("--fp16: bf16 here, without a loss scale")
    if not fp8:
        return
    recipe, sixteen = given.get("--fp8-recipe", "delayed"), given.get("--first-last-layers-bf16")
    done.put("fp8.recipe", recipe)
    done.put("fp8.param_gather", bool(given.get("--fp8-param-gather")))
    for where in ("start", "end"):
        count = given.get(f"--num-layers-at-{where}-in-bf16", 1) if sixteen else 0
        done.put(f"fp8.num_layers_at_{where}_in_bf16", count)
    if recipe == "delayed":
        done.put("fp8.amax_history_len", given.get("--fp8-amax-history-len", 1))
        done.put("fp8.amax_compute_algo", given.get("--fp8-amax-compute-algo", "most_recent"))
    if fp8 != (own := "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid"):
        done.differs(f"--fp8-format {fp8}: {recipe} is {own} here")


def _stepwise(done: Translation, text: str) -> None:
    """`0:16 2.4B:320 4.8B:624`: thresholds in tokens. One ramp-up where each step is as long and as high."""
    try:
        pairs = [(_amount(a) / done.given.get("--seq-length"), int(b)) for a, b in (p.split(":") for p in text.split())]
    except ValueError as error:
        raise ConfigError(f"--step-batch-size-schedule is {text!r}, expected THRESHOLD:BATCH ...") from error
    starts, sizes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    rises = {b - a for a, b in pairwise(sizes)}
    lengths = [b - a for a, b in pairwise(starts)]
    if len(rises) == 1 and starts[0] == 0 and max(lengths) - min(lengths) < 1e-6 * max(lengths):
        done.put("training.rampup_batch_size", [sizes[0], rises.pop(), round(starts[-1])])
        done.put("training.global_batch_size", sizes[-1])
        return
    done.notes["not supported"].append(
        "--step-batch-size-schedule: rampup_batch_size has steps of one length and height"
    )


def _amount(text: str) -> float:
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)


def _steps(done: Translation, samples: int) -> int:
    """Steps that take so many samples, the ramp-up counted as training/schedule.py does."""
    batch = done.fields["training.global_batch_size"]
    start, rise, over = done.fields.get("training.rampup_batch_size", (batch, 1, 0))
    steps = consumed = 0
    while start < batch and consumed < min(over, samples):
        consumed += start + int(consumed * ((batch - start) // rise) / over) * rise
        steps += 1
    return steps + max(0, samples - consumed) // batch


def _schedule(done: Translation) -> None:
    """Warm-up, then the decay at once; WSD: constant until its decay."""
    given = done.given
    train = done.fields["training.train_steps"]

    def steps(name: str) -> int | None:
        iters, samples = given.get(f"{name}-iters"), given.get(f"{name}-samples")
        return _steps(done, samples) if samples is not None else iters

    end = steps("--lr-decay") or train
    fraction = given.get("--lr-warmup-fraction")
    warmup = round(fraction * end) if fraction is not None else steps("--lr-warmup") or 0
    done.put("schedule.warmup_steps", warmup)
    style, start = given.get("--lr-decay-style", "linear"), warmup
    if style == "WSD":
        length = steps("--lr-wsd-decay")
        if length is None:
            raise ConfigError("--lr-decay-style WSD lacks --lr-wsd-decay-iters or --lr-wsd-decay-samples")
        style, start = given.get("--lr-wsd-decay-style", "exponential"), end - length
    known = get_args(ScheduleConfig.model_fields["decay_style"].annotation)
    if style == "constant" or (style not in known and style == "inverse-square-root"):
        done.put("schedule.decay_start", "never")
    else:
        done.put("schedule.decay_style", style if style in known else "linear")
        done.put("schedule.decay_start", start)
        if end != train:
            done.put("schedule.decay_steps", max(1, end - start))
    if style not in (*known, "constant"):
        written = "constant" if style == "inverse-square-root" else "linear"
        done.notes["not supported"].append(
            f"a decay of style {style}: {written} is written; here are {', '.join(known)}"
        )


def _data(done: Translation) -> None:
    given = done.given
    if "--num-workers" in given.values:
        done.put("data.loader_threads", max(1, given.get("--num-workers")))
    words = given.get("--train-data-path") or given.get("--data-path") or []
    blend = weighted_paths(words)
    if blend:
        done.put("data.blend", [one.model_dump(exclude_none=True) for one in blend])
    elif words:
        done.put("data.train_paths", words)
    else:
        done.notes[_COMPLETE].append("data.train_paths or data.blend: the command line names no --data-path")
    if given.get("--reset-attention-mask") or given.get("--dataloader-inter-document-masking"):
        done.put("diffusion.attention_boundary", "document")
    held_out = given.get("--valid-data-path")
    if held_out:
        paths = [path for one in weighted_paths(held_out) for path in one.paths] or held_out
        done.put("data.validation_paths", paths)
    _validation(done, len(done.fields.get("data.validation_paths", blend)) or 1)


def _validation(done: Translation, texts: int) -> None:
    """texts: each has a figure of its own here, from as many samples; Megatron's are of all together."""
    given = done.given
    shares = given.get("--split")
    try:
        numbers: list[float] = [float(text) for text in shares.replace(",", " ").split()] if shares else []
    except ValueError as error:
        raise ConfigError(f"--split is {shares}, expected numbers, as 949,50,1") from error
    total = math.fsum(numbers)
    share = numbers[1] / total if len(numbers) > 1 and total else 0.0
    from_split = "data.validation_paths" not in done.fields
    asked = {"--split", "--eval-interval", "--eval-iters", "--valid-data-path"} & given.values.keys()
    iters = given.get("--eval-iters", 100)
    if not asked or not iters or (from_split and numbers and not share):
        if not asked:
            done.differs("Megatron would validate every 1000 steps: set validation.* and data.holdout_tokens")
        return
    samples = math.ceil(iters * done.fields["training.global_batch_size"] / texts)
    done.put("validation.interval_steps", given.get("--eval-interval", 1000))
    done.put("validation.num_samples", samples)
    done.differs(
        f"each validation measures the same {samples} samples of each held-out text with the same masks, spread "
        "evenly: some hundred do"
    )
    if from_split:
        tokens = samples * done.fields["data.sequence_length"]
        done.put("data.holdout_tokens", tokens)
        of = f"--split would hold out {share:.3g} of the documents" if numbers else "Megatron's default holds out 0.03"
        done.differs(f"{of}; data.holdout_tokens {tokens} of each corpus is what validation reads")


def _checkpoints(done: Translation) -> None:
    given = done.given
    if "logging.wandb_project" in done.fields:
        done.put("run_dir", given.get("--save") or "runs/translated")
    load = given.get("--load")
    if load is not None and load != given.get("--save"):
        done.put("checkpoint.load_dir", load)
        done.differs("--load: a checkpoint of Megatron's is read by `illada checkpoint reshard MEGATRON NEW` first")
    if "--save-retain-interval" in given.values:
        done.put("checkpoint.keep_last", 1)
        done.put("checkpoint.keep_every", given.get("--save-retain-interval"))


def _report(done: Translation) -> None:
    done.differs("attention goes both ways and masked tokens are predicted: lr and batch of a causal run are a guess")
    for option, value in done.given.without:
        text = f"{option.name}{f' {value}' if value else ''}: {option.note}"
        if text not in done.notes[option.group]:
            done.notes[option.group].append(text)
    done.notes[_UNKNOWN] += done.given.unknown
