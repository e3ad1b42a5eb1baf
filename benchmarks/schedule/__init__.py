"""When rules for the plateau act."""
