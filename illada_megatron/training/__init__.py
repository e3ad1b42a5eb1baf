"""The loop: forward step, optimizer, schedules, validation and what is reported."""

from illada_megatron.training.trainer import TrainResult, train, train_step

__all__ = ["TrainResult", "train", "train_step"]
