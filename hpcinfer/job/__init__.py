"""A run over files: its start, its state on disk, its end, and who watches it."""
