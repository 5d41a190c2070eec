"""What a λ costs beside its evaluation on a CPU (P6): the switch alone, and with the proof that
memory holds it and the effective λ, as a sweep asks for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from pa_kernels import Lerp, compiled

import pa_fast
from bench.cases import OPS
from bench.pairs import FlatPair
from bench.run import Run
from pa_fast.throughput.harness import Way, require_bits

CASE = OPS["proof"]


def proof(run: Run) -> None:
    pair = FlatPair.drawn(CASE.size, *CASE.dtypes)
    live, base, instruct = (
        {str(t): tensor for t, tensor in enumerate(side)}
        for side in (pair.out, pair.base, pair.inst)
    )
    alone = Lerp(pair.out, pair.base, pair.inst)
    with pa_fast.LiveWeights.bind(live, base, instruct) as weights:
        loops = compiled.loops()
        grid = itertools.cycle(0.1 * k + 0.05 for k in range(10))

        def by(
            loops_: compiled.Loops | None, work: Callable[[float], object]
        ) -> Callable[[], None]:
            """`work` at the next λ, with compiled loops or without."""

            def run_() -> None:
                compiled._ready[:] = [] if loops_ is None else [loops_]
                work(next(grid))

            return run_

        def switch(lam: float) -> None:
            weights.set_lambda(lam)

        def prove(lam: float, merge_again: bool = False) -> None:
            weights.set_lambda(lam)
            weights.read_back(merge_again)
            weights.effective_lambda()

        def first(lam: float) -> None:
            prove(lam, merge_again=True)

        for work in (by(None, prove), by(loops, prove)):
            pair.poison()
            work()
            require_bits(weights.verify(), "a recorded switch")
        three, four = 3 * pair.nbytes, 4 * pair.nbytes
        ours = Way("switch alone", by(loops, alone.run_), moved_bytes=three)
        ways = [
            ours,
            Way("recorded, by torch", by(None, switch), moved_bytes=three),
            Way("all of a λ, by torch", by(None, prove), moved_bytes=four),
            Way("checksum, by torch", by(None, lambda _: weights.checksum())),
            Way("a merge again as well", by(loops, first)),
            ours.repeated,
        ]
        if loops is not None:
            ways += [
                Way("recorded, by numba", by(loops, switch), moved_bytes=three),
                Way("all of a λ, by numba", by(loops, prove), moved_bytes=four),
                Way("checksum, by numba", by(loops, lambda _: weights.checksum())),
            ]
        found = CASE.time(*ways)
        whole = found[f"all of a λ, by {'torch' if loops is None else 'numba'}"]
        run.record(
            CASE.target,
            f"all of a λ but its evaluation, {pair}",
            found.values(),
            ours.name,
            headline=f"{whole.median_s / found[ours.name].median_s:.2f} × the switch alone",
        )
