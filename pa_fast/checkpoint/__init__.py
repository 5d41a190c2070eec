"""Files ↔ tensors: open checkpoints from their headers, pair them, merge them to disk, check a
merge."""
