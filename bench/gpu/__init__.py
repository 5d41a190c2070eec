"""Everything that needs a GPU in one command, correctness first: `make gpu`, or `python -m
bench.gpu --help`.

Its stages, each in a file of its own, are timed and reported by what `make bench` uses. Without a
GPU `--rehearse` walks through every stage at tiny sizes under Triton's interpreter: the same code,
bits checked, nothing timed that means anything, nothing written.
"""
