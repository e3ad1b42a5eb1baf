"""pytest puts the folder of a conftest.py on the path: random_weights and random_checkpoint are found by it."""
