"""What goes wrong with checkpoints. No torch: the command line shows these without waiting for it."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the message names the path and what to do."""
