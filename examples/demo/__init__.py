"""A small base and instruct model, trained for real, and two evaluators that pull λ in opposite
directions."""
