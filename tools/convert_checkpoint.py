"""`illada convert` under Megatron's habit of tools: `to-hf CHECKPOINT DIRECTORY`, `from-hf DIRECTORY CHECKPOINT`."""

import sys

from illada_megatron.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
