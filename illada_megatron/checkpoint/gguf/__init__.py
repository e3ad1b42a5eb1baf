"""Checkpoints as files that llama.cpp runs.

In: a run's checkpoint, its tokenizer.
Out: one GGUF file with both.
Never imported here: a run's saver, Megatron's formats, training.
"""
