"""A training step, and its layers."""
