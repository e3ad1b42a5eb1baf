"""`illada convert` under Megatron's habit of tools: `to-hf CHECKPOINT DIRECTORY`, `from-hf DIRECTORY CHECKPOINT`, or
tools/checkpoint/convert.py's --loader, --saver, --load-dir and --save-dir."""

from illada_megatron.cli.main import run_convert_tool

if __name__ == "__main__":
    run_convert_tool()
