"""A checkpoint's bytes and tensors on disk or in object storage, and what is said about them.

In: tensors under canonical names; folders and `s3://` URLs.
Out: durable files with checksums, tensors box by box.
Never imported here: anything of Megatron, a model, a run; other folders of checkpoint/.
"""
