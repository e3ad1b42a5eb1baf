"""The masked loss alone."""
