"""Weights that follow λ in place."""
