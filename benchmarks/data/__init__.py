"""Corpora: producing, opening, reading, merging."""
