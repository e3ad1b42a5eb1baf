"""`python -m illada_megatron`: the same as `illada`."""

from illada_megatron.cli.main import main

if __name__ == "__main__":
    main()
