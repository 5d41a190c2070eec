"""The effect of lossy deltas on a model: reports over stores, compared with the exact merge on a
text, and their figure."""
