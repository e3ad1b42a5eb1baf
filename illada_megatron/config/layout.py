"""The whole configuration, and which layouts can work: the checks between model, parallel, data and training."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import model_validator as validator

from illada_megatron.config.communication import check_gradients, check_overlap
from illada_megatron.config.fp8 import check_fp8, token_multiple
from illada_megatron.config.pipeline_split import Split, expected_flops, split_layers, stage_lines, stages
from illada_megatron.config.places import check_places, with_places
from illada_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    FaultsConfig,
    Fp8Config,
    LayoutChoice,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    ScheduleConfig,
    Section,
    TrainingConfig,
    ValidationConfig,
)


class RunConfig(Section):
    """Everything a run depends on; saved beside it."""

    run_dir: str | None = None
    """The folder of the run (docs/training.md): checkpoint.save_dir, logging.tensorboard_dir and logging.jsonl_path lie
    in it where they are not given (null: none). None: there is no such folder."""
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    fp8: Fp8Config = Fp8Config()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @validator(mode="before")
    @classmethod
    def _places(cls, values: Any) -> Any:
        return with_places(values) if isinstance(values, Mapping) else values

    @validator(mode="after")
    def _check(self) -> Self:
        check_config(self)
        return self


@dataclass(frozen=True)
class Layout:
    """The sizes of the process groups of a run."""

    world_size: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    num_microbatches: int
    """Micro-batches of a step at the full global batch, a data-parallel rank."""

    def microbatches(self, batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches of a data-parallel rank for `batch_size` samples. Where these do not fill them all, the last
        places are filled with samples of weight 0."""
        count = -(-batch_size // (micro_batch_size * self.data))
        # the interleaved schedule takes multiples of the pipeline's depth
        return -(-count // self.pipeline) * self.pipeline if self.virtual > 1 else count


@dataclass(frozen=True)
class ChosenLayout:
    """The layout that a run takes on a number of ranks."""

    config: RunConfig
    """With the layout's fields in their places. Choosing from it again chooses the same."""
    layout: Layout
    number: int | None
    """Which of parallel.layouts, from 0; None: there was no choice."""
    refused: list[str]
    """Why those before it were not taken; with empty places: why none fits without them."""

    @property
    def empty_places(self) -> int:
        """Places of a step's micro-batches that no sample fills."""
        training = self.config.training
        return self.layout.num_microbatches * training.micro_batch_size * self.layout.data - training.global_batch_size

    @property
    def cost(self) -> float:
        """The time of a step, in passes of one sample through the whole model on one rank: the passes of a rank's
        micro-batches, of which each rank does one part in TP * CP * PP, and of a pipeline's start and end, (PP - 1) /
        chunks (arXiv 2104.04473, section 2.2). What ranks send each other is not counted."""
        layout, training = self.layout, self.config.training
        passes = layout.num_microbatches + (layout.pipeline - 1) / layout.virtual
        # forward and twice as much backward; recomputed, the forward pass comes again
        again = 4 / 3 if training.recompute == "full" else 1.0
        return again * passes * training.micro_batch_size / (layout.tensor * layout.context * layout.pipeline)


def check_config(config: RunConfig) -> None:
    """The checks that do not need the world size. Raises ValueError with the fields, the numbers and the fix."""
    model, parallel, training = config.model, config.parallel, config.training
    check_places(config.run_dir, config.logging)
    if training.profile is not None and training.profile.tool == "torch" and config.run_dir is None:
        raise ValueError(
            "training.profile needs run_dir, found null: traces are written into its folder traces; set run_dir, or "
            "leave profile out"
        )
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tp_text = f"parallel.tensor_model_parallel_size {tp}"
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "padded_vocab_size"):
        value = getattr(model, name)
        if value % tp:
            fix = "make_vocab_size_divisible_by" if name == "padded_vocab_size" else name
            raise ValueError(f"model.{name} {value} is not a multiple of {tp_text}: change model.{fix} or the layout")
    pipeline_split(config)
    if parallel.model_chunks > 1 and pp == 1:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size {parallel.virtual_pipeline_model_parallel_size} needs "
            "parallel.pipeline_model_parallel_size > 1, found 1: raise it, or leave the interleaving out"
        )
    if config.checkpoint.keep_every is not None and config.checkpoint.keep_last is None:
        raise ValueError(
            f"checkpoint.keep_every {config.checkpoint.keep_every} needs checkpoint.keep_last, found null, which keeps "
            "every checkpoint: set it, or leave keep_every out"
        )
    if config.faults.on_bad_steps == "rollback" and not (config.checkpoint.save_dir or config.checkpoint.load_dir):
        raise ValueError(
            "faults.on_bad_steps rollback needs a checkpoint to go back to, found checkpoint.save_dir and load_dir "
            "null: set checkpoint.save_dir and checkpoint.interval_steps, or faults.on_bad_steps=stop"
        )
    if parallel.sequence_parallel and tp == 1:
        raise ValueError(
            "parallel.sequence_parallel true needs parallel.tensor_model_parallel_size > 1, found 1: "
            "set sequence_parallel=false"
        )
    if parallel.layouts and parallel.data_parallel_size is not None:
        raise ValueError(
            f"parallel.data_parallel_size {parallel.data_parallel_size} fixes the number of ranks, for which "
            "parallel.layouts is there to choose a layout: leave one of them out"
        )
    for number, choice in enumerate(parallel.layouts):
        try:
            check_config(_with_layout(config, choice, []))
        except ValueError as error:
            raise ValueError(f"parallel.layouts[{number}]: {error}") from error
    cp, length = parallel.context_parallel_size, config.data.sequence_length
    if cp > 1 and length % (2 * cp):
        raise ValueError(
            f"data.sequence_length {length} is not a multiple of 2 * parallel.context_parallel_size {cp}: each rank "
            "has two chunks of it; change one of them"
        )
    tokens = training.micro_batch_size * length
    if parallel.sequence_parallel and cp == 1 and tokens % tp:
        raise ValueError(
            f"training.micro_batch_size * data.sequence_length {tokens} is not a multiple of {tp_text}, which "
            "parallel.sequence_parallel needs: change one of them"
        )
    if training.precision == "fp8":
        check_fp8(config)
    check_gradients(parallel, training.precision == "fp8" and config.fp8.param_gather)
    check_overlap(parallel, training, config.runtime, config.fp8)
    virtual = parallel.model_chunks
    if row_tokens(config) is None and virtual > 1 and parallel.pipeline_model_parallel_size == 2:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size {virtual} on two stages with context_parallel_size "
            f"{parallel.context_parallel_size} and diffusion.attention_boundary document: rows differ in length, and "
            "of two micro-batches at a time the stages would take one's length for the other's; leave "
            "virtual_pipeline_model_parallel_size out"
        )
    if parallel.tp_comm_overlap and row_tokens(config) is None:
        raise ValueError(
            f"parallel.tp_comm_overlap true with context_parallel_size {parallel.context_parallel_size} and "
            "diffusion.attention_boundary document: each micro-batch's row has a length of its own, and buffers have "
            "one; set tp_comm_overlap=false"
        )
    if config.data.sequence_length > model.max_sequence_length:
        raise ValueError(
            f"data.sequence_length {config.data.sequence_length} is above model.max_sequence_length "
            f"{model.max_sequence_length}: change one of them"
        )
    changes = [("schedule.changes", change.lr) for change in config.schedule.changes]
    for name, rate in [("training.lr", training.lr), *changes]:
        if config.schedule.min_lr > rate:
            raise ValueError(f"schedule.min_lr {config.schedule.min_lr} is above {name} {rate}: lower it")
    if training.rampup_batch_size:
        start, increment, _ = training.rampup_batch_size
        if start > training.global_batch_size or (training.global_batch_size - start) % increment:
            raise ValueError(
                f"training.rampup_batch_size: from {start} in steps of {increment} never reaches "
                f"training.global_batch_size {training.global_batch_size}"
            )


def pipeline_split(config: RunConfig) -> Split:
    """[pipeline rank][model chunk] -> its number of layers. Raises ValueError where parallel.pipeline_layout does not
    fit model and layout."""
    model, parallel = config.model, config.parallel
    return split_layers(
        model,
        parallel.pipeline_model_parallel_size,
        parallel.model_chunks,
        parallel.pipeline_layout,
        expected_flops(model, config.diffusion, config.data.sequence_length),
    )


def row_multiple(config: RunConfig) -> int:
    """With context parallelism the tokens of a micro-batch's packed row are a multiple of this: each rank's, and with
    sequence parallelism each tensor-parallel rank's, are one of what FP8 products ask for, 16 at least."""
    parallel = config.parallel
    sequence = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return max(16, token_multiple(config)) * parallel.context_parallel_size * sequence


def row_tokens(config: RunConfig) -> int | None:
    """Tokens of a micro-batch's packed row, the padding of its segments included (diffusion/context.py); None: it
    differs between micro-batches, as nobody knows how many documents one has."""
    length, parallel, samples = config.data.sequence_length, config.parallel, config.training.micro_batch_size
    if parallel.context_parallel_size == 1:
        return samples * length
    boundary = config.diffusion.attention_boundary
    if boundary == "document":
        return None
    # two segments of a sequence that is a multiple of 2 * CP take that much more, where they have to be padded
    cut = 0 if boundary == "none" else 2 * parallel.context_parallel_size
    multiple = row_multiple(config)
    return -(-samples * (length + cut) // multiple) * multiple


def resolve_layout(config: RunConfig, world_size: int, padded: bool = True) -> Layout:
    """The layout on `world_size` ranks. Raises ValueError with the fields, the numbers and the fix.

    padded: whether training.pad_global_batch counts; else the batch has to fill all places.
    """
    parallel, training = config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    replica = tp * cp * pp
    if world_size % replica:
        names, text, fields = "tensor * pipeline", f"{tp} * {pp}", "pipeline_model_parallel_size"
        if cp > 1:
            names, text = "tensor * context * pipeline", f"{tp} * {cp} * {pp}"
            fields = "context_parallel_size / pipeline_model_parallel_size"
        raise ValueError(
            f"world size {world_size} is not a multiple of {names} parallel size {text} = {replica}: start that many "
            f"ranks or change parallel.tensor_model_parallel_size / {fields}"
        )
    dp = world_size // replica
    if parallel.data_parallel_size not in (None, dp):
        context = f" * CP {cp}" if cp > 1 else ""
        raise ValueError(
            f"world size {world_size} = TP {tp}{context} * PP {pp} * DP {dp}, but parallel.data_parallel_size is "
            f"{parallel.data_parallel_size}: start {replica * (parallel.data_parallel_size or 1)} ranks or change it"
        )
    sizes = {"training.global_batch_size": training.global_batch_size}
    if training.rampup_batch_size:
        sizes["training.rampup_batch_size start"] = training.rampup_batch_size[0]
        sizes["training.rampup_batch_size increment"] = training.rampup_batch_size[1]
    virtual, micro = parallel.model_chunks, training.micro_batch_size
    layout = Layout(world_size, tp, pp, virtual, cp, dp, num_microbatches=0)
    for name, size in sizes.items() if not (padded and training.pad_global_batch) else ():
        if size % (micro * dp):
            raise ValueError(
                f"{name} {size} is not a multiple of micro_batch_size * data parallel size {micro} * {dp} = "
                f"{micro * dp}: change one of them, or set training.pad_global_batch=true"
            )
        if layout.microbatches(size, micro) * micro * dp != size:
            raise ValueError(
                f"{name} {size} gives {size // (micro * dp)} micro-batches a rank, which the interleaved schedule "
                f"needs to be a multiple of parallel.pipeline_model_parallel_size {pp}: change one of them, or set "
                "training.pad_global_batch=true"
            )
    return replace(layout, num_microbatches=layout.microbatches(training.global_batch_size, micro))


def choose_layout(config: RunConfig, world_size: int) -> ChosenLayout:
    """The first of parallel.layouts that fits `world_size` ranks; where the list is empty, the section's own fields.
    Where none fits and training.pad_global_batch allows it, the cheapest of those that fit with empty places.

    The global batch stays as it is, so that the same samples make the same steps on any number of ranks. Raises
    ValueError where none fits, with the reason for each.
    """
    candidates = _candidates(config)
    listed = bool(config.parallel.layouts)
    refused: list[str] = []
    for number, candidate in enumerate(candidates):
        try:
            layout = resolve_layout(candidate, world_size, padded=False)
        except ValueError as error:
            refused.append(f"parallel.layouts[{number}]: {error}" if listed else str(error))
            continue
        return ChosenLayout(candidate, layout, number if listed else None, refused)
    padded = []
    for number, candidate in enumerate(candidates if config.training.pad_global_batch else ()):
        with suppress(ValueError):
            layout = resolve_layout(candidate, world_size)
            padded.append(ChosenLayout(candidate, layout, number if listed else None, refused))
    if padded:
        return min(padded, key=lambda one: one.cost)
    if not listed:
        raise ValueError(refused[0])
    raise ValueError(
        f"none of the {len(candidates)} parallel.layouts fits {world_size} ranks: start another number of ranks or add "
        "a layout for it (`illada train --dry-run` with --nproc and --nnodes MIN:MAX shows which numbers fit)\n  "
        + "\n  ".join(refused)
    )


def _candidates(config: RunConfig) -> list[RunConfig]:
    """The configuration in each of parallel.layouts, in their order; as it is where the list is empty."""
    training = config.training
    complete = [
        choice.model_copy(
            update={
                "micro_batch_size": choice.micro_batch_size or training.micro_batch_size,
                "recompute": choice.recompute or training.recompute,
            }
        )
        for choice in config.parallel.layouts
    ]
    return [_with_layout(config, choice, complete) for choice in complete] or [config]


def _with_layout(config: RunConfig, choice: LayoutChoice, layouts: list[LayoutChoice]) -> RunConfig:
    """The configuration with a choice's fields in their places, and what may be chosen again."""
    sizes = choice.model_dump(exclude={"micro_batch_size", "recompute"})
    training = choice.model_dump(include={"micro_batch_size", "recompute"}, exclude_none=True)
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={**sizes, "layouts": layouts}),
            "training": config.training.model_copy(update=training),
        }
    )


def layout_rows(config: RunConfig, layout: Layout) -> list[tuple[str, str]]:
    """The layout as rows of a table, and why it was taken where there was a choice."""
    training = config.training
    chosen = choose_layout(config, layout.world_size)
    why = []
    if chosen.number is not None:
        text = f"parallel.layouts[{chosen.number}] of {len(config.parallel.layouts)}, the first that fits"
        why = [("chosen", "\n".join([text, *(f"not {reason}" for reason in chosen.refused)]))]
        if chosen.empty_places:
            text = "the cheapest: none fits without empty places"
            why = [("chosen", f"parallel.layouts[{chosen.number}] of {len(config.parallel.layouts)}, {text}")]
    return [
        ("world size", f"{layout.world_size}"),
        ("layout", layout_text(layout, config.parallel.sequence_parallel)),
        *_stage_rows(config),
        *why,
        (
            "global batch",
            f"{training.global_batch_size} sequences of {config.data.sequence_length} tokens = "
            f"{training.global_batch_size * config.data.sequence_length:,} tokens; "
            f"{layout.num_microbatches} micro-batches of {training.micro_batch_size} a rank"
            f"{empty_places_text(chosen)}",
        ),
        *_context_rows(config),
        ("parameters", f"{config.model.num_parameters:,}"),
    ]


def _context_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Where sequences are shared, what a rank has of a micro-batch."""
    ranks, row = config.parallel.context_parallel_size, row_tokens(config)
    if ranks == 1:
        return []
    chunks = f"segments padded to multiples of {2 * ranks}, two chunks of each a rank"
    if row is None:
        return [("micro-batch", f"{chunks}; its length differs")]
    return [("micro-batch", f"{row:,} tokens with padding, {row // ranks:,} a context-parallel rank; {chunks}")]


def _stage_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Where there is a pipeline, what each stage has."""
    split = pipeline_split(config)
    if len(split) == 1:
        return []
    flops = expected_flops(config.model, config.diffusion, config.data.sequence_length)
    return [("stages", "\n".join(stage_lines(stages(config.model, split, flops))))]


def empty_places_text(chosen: ChosenLayout) -> str:
    """What of a step is filled up, to follow other words; nothing where nothing is."""
    empty = chosen.empty_places
    return f"; {empty} of {chosen.config.training.global_batch_size + empty} places stay empty" if empty else ""


def layout_text(layout: Layout, sequence_parallel: bool) -> str:
    """The sizes of the process groups in words."""
    sequence = " + sequence" if sequence_parallel else ""
    interleaved = f" x {layout.virtual} chunks" if layout.virtual > 1 else ""
    context = f"context {layout.context}, " if layout.context > 1 else ""
    return f"tensor {layout.tensor}{sequence}, pipeline {layout.pipeline}{interleaved}, {context}data {layout.data}"
