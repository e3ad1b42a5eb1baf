"""Saving and resharding."""
