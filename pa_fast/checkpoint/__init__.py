"""Checkpoints: open them from their headers, pair them, merge them to disk, and verify a merge."""
