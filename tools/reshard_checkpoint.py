"""`illada checkpoint reshard` by itself: a checkpoint rewritten for another layout, from and to Megatron's too."""

from illada_megatron.cli.checkpoint_commands import reshard
from illada_megatron.cli.main import run_tool

if __name__ == "__main__":
    run_tool(reshard, "reshard_checkpoint")
