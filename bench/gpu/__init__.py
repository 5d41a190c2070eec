"""Everything that needs a GPU in one command, correctness first: `make gpu`, or `python -m
bench.gpu --help`.

    suite      the tests that a GPU makes possible; one that fails and no speed is printed
    stages     what is timed, in order of importance, each in a file of its own
    run        where and how long: device, clock, sizes, ledger, the minutes that are left
    ledger     rows, written to bench/results/ when they are measured, with the goals of P1–P12

Without a GPU `--rehearse` walks through every stage at tiny sizes under Triton's interpreter: the
same code, bits checked, nothing timed that means anything, nothing written.
"""
