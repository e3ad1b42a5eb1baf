"""What is done with checkpoints without a run: reshard, average, compare, inspect.

In: a path to a checkpoint of any kind.
Out: a new checkpoint, or what there is to say about one.
Never imported here: a run's saver and state, models.
"""
