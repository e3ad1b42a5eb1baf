"""Measurements, by what is measured; each is started as `python -m benchmarks.step.train_step` and ends in one line of JSON."""
