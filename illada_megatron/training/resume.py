"""What a start says of the checkpoint that it goes on from: what has changed since, and whether anything is left."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from illada_megatron.config import RunConfig, TrainingConfig
from illada_megatron.config.schema.learning import GONE_PLATEAU_FIELDS
from illada_megatron.runs.fields import MISSING, differing, flat

# Fields, or beginnings of them, that change where and how fast a step is computed and not what it computes.
_LAYOUT = (
    *("parallel.", "runtime.", "training.micro_batch_size", "training.recompute", "training.pad_global_batch"),
    *("data.loader_threads", "data.prefetch_microbatches"),
)
# ... and where things are written.
_PLACES = ("run_dir", "checkpoint.", "logging.")


# null means 0.8 where there are no schedule.changes, which older checkpoints do not have
_SAME_DECAY = ("schedule.decay_start", 0.8, None)


@dataclass(frozen=True)
class Change:
    """A field that is another than when the checkpoint was saved."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field} {_shown(self.old)} -> {_shown(self.new)}"


def changes_since(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """The fields of `config` that differ from those a checkpoint has stored. What its program did not know had the
    value that is now the default."""
    stored = flat(saved)
    # a default of null stands for no section, where the checkpoint has its fields
    sections = {field.rpartition(".")[0] for field in stored}
    before = {field: one for field, one in flat(RunConfig().model_dump(mode="json")).items() if field not in sections}
    before |= {field: one for field, one in stored.items() if field.rpartition(".")[2] not in GONE_PLATEAU_FIELDS}
    fields = differing([before, flat(config.model_dump(mode="json"))])
    changes = [Change(field, old, new) for field, (old, new) in fields.items()]
    return [one for one in changes if (one.field, one.old, one.new) != _SAME_DECAY]


def change_lines(changes: Sequence[Change], where: object) -> Iterator[str]:
    """For the terminal: a line for each that may change what is computed, one for the layout, one for places."""
    layout = [one for one in changes if one.field.startswith(_LAYOUT)]
    places = [one for one in changes if one.field.startswith(_PLACES)]
    for one in changes:
        if one not in layout and one not in places:
            yield f"changed since {where}: {one}"
    if layout:
        yield f"changed in the layout only: {', '.join(map(str, layout))}"
    if places:
        yield f"changed in what is written: {', '.join(map(str, places))}"


def last_step(training: TrainingConfig) -> int:
    """After which a run ends."""
    return min(training.exit_steps or training.train_steps, training.train_steps)


def where_it_stands(training: TrainingConfig, checkpoint: object, step: int, consumed_samples: int) -> str:
    """Whether a run that has loaded the checkpoint goes on, for the terminal."""
    if step < last_step(training):
        return f"continues from {checkpoint}: step {step}, {consumed_samples} samples consumed"
    limits = [f"training.train_steps {training.train_steps}"]
    if training.exit_steps is not None:
        limits.append(f"training.exit_steps {training.exit_steps}")
    raised = "training.exit_steps" if last_step(training) < training.train_steps else "training.train_steps"
    return (
        f"finished at step {step} ({' and '.join(limits)}; {checkpoint}): nothing is left to train; "
        f"to go on, raise {raised}"
    )


def _shown(value: Any) -> str:
    return "null" if value is None else "(not known)" if value == MISSING else str(value)
