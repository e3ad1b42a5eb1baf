"""Measurements, by what is measured; each is started as `python -m benchmarks.step.train_step`, and its last line is
JSON."""
