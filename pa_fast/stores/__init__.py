"""How the difference between two checkpoints is held beside the live copy: one class per store."""
