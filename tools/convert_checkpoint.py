"""`illada convert` under Megatron's habit of tools: `to-hf CHECKPOINT DIRECTORY`, `from-hf DIRECTORY CHECKPOINT`."""

import sys

from illada_megatron.checkpoint.errors import CheckpointError
from illada_megatron.cli.convert_command import app
from illada_megatron.config import ConfigError
from illada_megatron.data.errors import DataError

if __name__ == "__main__":
    try:
        app()
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
