"""The loop: forward step, optimizer, schedules, validation and what is reported.

In: a configuration, a `Runtime`.
Out: a trained model's checkpoints, logs.
Never imported here: the command line.
"""

from illada_megatron.runtime.megatron import import_megatron

import_megatron()  # before what follows imports it

from illada_megatron.training.trainer import TrainResult, train, train_step  # noqa: E402

__all__ = ["TrainResult", "train", "train_step"]
