"""Layout-free checkpoints of a run: saved under one layout, loaded under any other.

In: a run's model chunks and optimizer; a save_dir.
Out: complete checkpoints, or their state in another layout.
Never imported here: training, the command line.
"""
