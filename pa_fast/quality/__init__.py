"""What lossy deltas do to a model: reports over stores, beside the exact merge on a text, and their
figure."""
