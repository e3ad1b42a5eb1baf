"""Checkpoints to and from the layouts of published models: the directories that Hugging Face's transformers loads.

In: a run's checkpoint, or a published model's directory.
Out: the other of the two, compared.
Never imported here: a run's saver, Megatron's formats, training.
"""
