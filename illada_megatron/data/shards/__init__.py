"""Shards of tokens on disk or in object storage: written, found, read, merged, checked.

In: documents as token ids; prefixes, globs, manifests.
Out: `.bin`/`.idx` pairs, manifests, tokens by document.
Never imported here: corpora, preprocessing, the configuration, torch.
"""
