"""Layout-free checkpoints: saved under one layout, loaded under any other."""
