"""`illada preprocess` under Megatron's name for it: the same command and options (--input, --output-prefix,
--tokenizer-model, --vocab-file, --merge-file, --json-keys, --append-eod, --workers, ...)."""

import sys

from illada_megatron.cli.main import run_tool
from illada_megatron.cli.preprocess_command import preprocess
from illada_megatron.system.terminal import say

if __name__ == "__main__":
    if not {"--append-eod", "--no-append-eod", "--help"} & {*sys.argv}:
        say("documents end with EOS also without --append-eod; --no-append-eod leaves it out", error=True)
    run_tool(preprocess, "preprocess_data")
