"""What follows too many bad steps: the end of the run, or a return to the last good checkpoint."""

import math

from torch import Tensor

from illada_megatron.checkpoint.files.agreement import gathered
from illada_megatron.checkpoint.store import checkpoint_to_continue
from illada_megatron.training.bad_steps import BadSteps, Rollback
from illada_megatron.training.forward_step import BatchSlice
from illada_megatron.training.schedule import LearningRate, global_batch_size
from illada_megatron.training.setup import TrainingState, restore, slices
from illada_megatron.training.validation import speaks_for_tensor_group


def recover(state: TrainingState) -> Rollback:
    """After faults.max_bad_steps bad steps in a row: load the newest checkpoint from before the row into the running
    process and go on behind their samples. Every rank calls it, with nothing being saved. A stop in such a row saves in
    the middle of it: weights that may be what is bad.

    Raises FloatingPointError where faults.on_bad_steps is "stop", where there is no checkpoint, or where
    faults.max_rollbacks returns to it have led to bad steps again.
    """
    config, streak = state.config, state.bad_steps.streak
    if config.faults.on_bad_steps == "stop":
        raise FloatingPointError(
            f"{_told(state)}; weights and the last checkpoint, where there is one, are untouched: start the run again "
            "with a lower training.lr, which continues from it, or, where one is saved before such steps, let the run "
            "go back by itself (faults.on_bad_steps=rollback)"
        )
    checkpoint, refused = checkpoint_to_continue(config.checkpoint, good=True)
    if checkpoint is None or checkpoint.progress is None:
        raise FloatingPointError(
            f"{_told(state)}; there is no checkpoint of this run to roll back to"
            + "".join(f"; {reason}" for reason in refused)
            + ": start again with a lower training.lr, and save before (checkpoint.interval_steps)"
        )
    if not state.bad_steps.may_roll_back(checkpoint.step):
        raise FloatingPointError(
            f"{_told(state)}, after {config.faults.max_rollbacks} returns to {checkpoint.path} "
            f"(faults.max_rollbacks): it is no way on. Lower training.lr, leave out more samples before the bad ones "
            f"(faults.rollback_margin_steps {config.faults.rollback_margin_steps}), or start from an older checkpoint "
            "with checkpoint.load_dir and a new checkpoint.save_dir"
        )
    from_step, before = state.step, state.bad_steps
    batch_size = global_batch_size(config.training, streak[0].first_sample)
    state.close()
    # Both go back too: a decay that began after the checkpoint has not begun.
    state.schedule, state.bad_steps = LearningRate(config), BadSteps(config.faults)
    restore(state, checkpoint)
    state.schedule.begin(state.step, state.consumed_samples)
    first, end = state.bad_steps.roll_back(before, state.step, state.consumed_samples, batch_size)
    state.loader = state.source.prefetch(slices(state))
    ranges = tuple((one.first_sample, one.end_sample) for one in streak)
    return Rollback(from_step, state.step, str(checkpoint.path), first, end, ranges)


def bad_samples(state: TrainingState, local: list[Tensor], first_sample: int, batch_size: int) -> list[int]:
    """Samples of the micro-batches of a bad step whose loss is not finite; none where only the gradient is not.

    local: this rank's sums of each micro-batch (last stage), else empty. Every rank calls it.
    """
    own: list[int] = []
    if speaks_for_tensor_group():
        for microbatch, sums in enumerate(local):
            if not math.isfinite(float(sums[0])):
                own += state.source.samples(BatchSlice(first_sample, batch_size, microbatch))
    return sorted({sample for samples in gathered(own) for sample in samples})


def _told(state: TrainingState) -> str:
    last = state.bad_steps.streak[-1]
    first = state.bad_steps.streak[0]
    return (
        f"step {last.step}: the loss is {last.loss}, the gradient norm {last.grad_norm}, which makes "
        f"{len(state.bad_steps.streak)} bad steps in a row (faults.max_bad_steps; samples {first.first_sample} to "
        f"{last.end_sample - 1})"
    )
