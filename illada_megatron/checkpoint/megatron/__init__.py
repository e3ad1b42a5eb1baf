"""Megatron's own checkpoints: `torch_dist` and the legacy files of each rank, with its `args`.

In: directories that Megatron wrote; a configuration.
Out: whole tensors under canonical names; where a legacy file's elements lie.
Never imported here: checkpoint's tools, Hugging Face's layouts, a run's saver.
"""
