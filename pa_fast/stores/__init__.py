"""Stores of the difference between two checkpoints beside the live copy: one class per store."""
