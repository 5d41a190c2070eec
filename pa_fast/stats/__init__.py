"""What a sweep's curve means: bands, the set of λ that may be best, the choice, its honest gain.

Everything is a function of the items' scores, and so of the journal alone; what is drawn is drawn
with a fixed seed.
"""
