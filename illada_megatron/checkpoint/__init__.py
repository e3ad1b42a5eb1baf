"""Layout-free checkpoints: saved under one layout, loaded under any other."""

from illada_megatron.checkpoint.sharded import load_checkpoint, save_checkpoint
from illada_megatron.checkpoint.store import CheckpointError, CheckpointInfo, newest_complete

__all__ = ["CheckpointError", "CheckpointInfo", "load_checkpoint", "newest_complete", "save_checkpoint"]
