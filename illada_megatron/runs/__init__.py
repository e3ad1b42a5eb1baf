"""Runs as they lie on the disk, finished or not: what was configured, what came of it, how two of them differ.

In: folders of runs, or their step logs.
Out: fields that differ, curves, a table, a picture.
Never imported here: torch, megatron-core, what makes a run.
"""
