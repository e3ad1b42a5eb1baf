"""What a machine with one GPU is worth, and whether the code is right there: `make gpu`."""
