"""Checkpoints to and from the layouts of published models: the directories that Hugging Face's transformers loads."""
