"""The acceptance figures of the statistics, measured on simulated sweeps.

    python -m tests.stats.acceptance

prints each beside what is expected. The tests ask for the same figures, of fewer sweeps where a
quick one will do.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from pa_fast.base import Lambda
from pa_fast.stats import adaptive
from pa_fast.stats.bands import band, best_set, draws
from pa_fast.stats.choice import choose
from pa_fast.stats.crossfit import crossfit
from pa_fast.stats.curve import Curve, curve
from pa_fast.stats.finding import Finding
from pa_fast.stats.frontier import kept, undominated
from pa_fast.stats.items import Items
from tests.stats.simulate import SHAPES, Sweeps, grid, peaked

GRID = grid(21)
LAST = len(GRID) - 1


def sweeps(
    shape: str, n: int, repeats: int, lams: np.ndarray = GRID
) -> Iterator[tuple[Items, Curve, np.ndarray]]:
    """`repeats` sweeps, each with its curve and the true one."""
    simulated = Sweeps(lams, SHAPES[shape])
    for seed in range(repeats):
        items = simulated.draw(np.random.Generator(np.random.PCG64(seed)), n)
        yield items, curve(items), simulated.p


def coverage_of_bands(n: int, repeats: int, *, floor: bool = True, shape: str = "peak +2") -> float:
    """Share of sweeps whose band holds all true differences to λ = 1."""
    hits = []
    for _, found, true in sweeps(shape, n, repeats):
        found = found if floor else replace(found, floor=1e-9)
        held = band(found, LAST, draws(found.cov))
        diff = true - true[LAST]
        hits.append(np.all((held.low <= diff + 1e-12) & (diff <= held.high + 1e-12)))
    return float(np.mean(hits))


def coverage_of_sets(shape: str, n: int, repeats: int) -> tuple[float, float]:
    """Share of sweeps whose set holds a true best λ, averaged over these; and λ in the set."""
    hits, sizes = [], []
    for _, found, true in sweeps(shape, n, repeats):
        keep = best_set(found, draws(found.cov))
        hits.append(keep[true >= true.max() - 1e-9].mean())
        sizes.append(keep.sum())
    return float(np.mean(hits)), float(np.mean(sizes))


def bias_and_band(shape: str, n: int, repeats: int) -> tuple[float, float, float]:
    """Mean error of the cross-fitted gain, and of the best score's own gain, in points; share of
    sweeps whose band holds the true gain at λ̂."""
    honest, own, hits = [], [], []
    for items, found, true in sweeps(shape, n, repeats):
        chosen, best = choose(found), int(np.argmax(found.s))
        held = band(found, LAST, draws(found.cov))
        gain = true[chosen] - true[LAST]
        honest.append(crossfit(items, LAST, found) - gain)
        own.append(found.s[best] - found.s[LAST] - (true[best] - true[LAST]))
        hits.append(held.low[chosen] <= gain + 1e-12 and gain <= held.high[chosen] + 1e-12)
    return 100 * float(np.mean(honest)), 100 * float(np.mean(own)), float(np.mean(hits))


def adaptive_sweep(items: Items) -> tuple[list[float], Curve]:
    """λ that `--lambdas auto` evaluates of a finished grid of steps of 0.02, and their curve."""
    places = {round(float(lam), 6): index for index, lam in enumerate(items.lams)}
    lams = list(adaptive.first().lams)
    while True:
        part = items.select(np.array([places[lam] for lam in sorted(lams)]))
        more = adaptive.following(part).lams
        if not more:
            return sorted(lams), curve(part)
        lams += more


def losses(n: int, repeats: int, gain: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points lost at the λ that `auto` chooses, its distance from the peak, and λ evaluated, of
    sweeps whose peaks lie anywhere from 0.3 to 0.7."""
    lost, far, used = [], [], []
    for seed in range(repeats):
        rng = np.random.Generator(np.random.PCG64(seed))
        peak = float(rng.uniform(0.3, 0.7))
        shape = peaked(gain, peak)
        items = Sweeps(grid(51), shape).draw(rng, n)
        lams, found = adaptive_sweep(items)
        chosen = found.lams[choose(found)]
        lost.append(100 * (shape(np.array([peak])) - shape(np.array([chosen])))[0])
        far.append(abs(chosen - peak))
        used.append(len(lams))
    return np.array(lost), np.array(far), np.array(used)


def two_lambdas() -> tuple[float, float]:
    """The largest difference of d/se from `scipy.stats.ttest_rel`, and c, of two λ."""
    found = []
    for seed in range(20):
        items = Sweeps(grid(2), SHAPES["monotone"]).draw(np.random.default_rng(seed), 300)
        whole = curve(items)
        held = band(whole, 1, draws(whole.cov))
        expected = stats.ttest_rel(items.y[:, 0], items.y[:, 1]).statistic
        found.append((abs(held.diff[0] / held.se[0] - expected), held.c))
    apart, c = np.array(found).T
    return float(apart.max()), float(c.mean())


def ten_rivals() -> float:
    """c of ten equal, independent rivals of one λ, averaged over which λ that is."""
    found = Curve(grid(11), np.zeros(11), np.eye(11), 1e-9)
    z = draws(found.cov)
    return float(np.mean([band(found, ref, z).c for ref in range(11)]))


def dunnett_critical() -> float:
    """The difference that `scipy.stats.dunnett` finds at p = 0.05 for ten groups, as t."""
    rng = np.random.default_rng(0)
    groups = [(g := rng.standard_normal(4000)) - g.mean() for _ in range(11)]
    groups = [g / g.std(ddof=1) for g in groups]

    def p(t: float) -> float:
        moved = [groups[0] + t * np.sqrt(2 / 4000), *groups[1:10]]
        result = stats.dunnett(*moved, control=groups[10], random_state=np.random.default_rng(1))
        return float(result.pvalue[0])

    low, high = 2.0, 3.5
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if p(middle) > 0.05 else (low, middle)
    return (low + high) / 2


def constraint(n: int, repeats: int, share: float = 0.98) -> tuple[float, float]:
    """Share of sweeps in which the smallest λ that is kept keeps less than `share` in truth: by the
    test, and by the scores alone."""
    tested, points = [], []
    for _, found, true in sweeps("monotone", n, repeats):
        short = true < share * true[LAST] - 1e-12
        tested.append(np.any(kept(found, LAST, share) & short))
        failed = np.flatnonzero(found.s < share * found.s[LAST])
        points.append(np.any(short[failed.max() + 1 if len(failed) else 0 :]))
    return float(np.mean(tested)), float(np.mean(points))


def frontier(n: int, repeats: int) -> tuple[float, float]:
    """Share of sweeps that lose a true member of the frontier of a peaked and a rising score: by
    the test, and by the scores alone."""
    lams = grid(11)
    first, second = Sweeps(lams, SHAPES["peak +2"]), Sweeps(lams, SHAPES["monotone"])
    better = (first.p[:, None] > first.p) & (second.p[:, None] > second.p)
    member = ~better.any(0)
    tested, points = [], []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        curves = [curve(first.draw(rng, n)), curve(second.draw(rng, n))]
        tested.append(np.any(member & ~undominated(curves)))
        above = [one.s[:, None] > one.s for one in curves]
        points.append(np.any(member & (above[0] & above[1]).any(0)))
    return float(np.mean(tested)), float(np.mean(points))


def speed() -> tuple[float, float]:
    """Seconds of CPU for 50,000 items at 21 λ: bands and set; cross-fit."""
    items = Sweeps(GRID, SHAPES["peak +2"]).draw(np.random.default_rng(0), 50_000)
    start = time.process_time()
    found = curve(items)
    z = draws(found.cov)
    band(found, LAST, z), best_set(found, z), choose(found)
    middle = time.process_time()
    crossfit(items, LAST, found)
    return middle - start, time.process_time() - middle


def demo() -> Finding:
    """The ICL accuracy of the shipped demo pair at 11 λ."""
    import pa_fast

    folder = pathlib.Path(__file__).parents[2] / "examples" / "demo"
    lm = pa_fast.load(folder / "pair" / "base", folder / "pair" / "instruct")
    asked = rf"icl:{folder / 'fewshot.jsonl'},shots=5,sep=\n"
    with tempfile.TemporaryDirectory() as out:
        return pa_fast.sweep(lm, "0:1:0.1", asked, out, figure=False).answer().objective


@dataclass(frozen=True)
class Row:
    """One promise of the method: what is measured, what is expected, what was found."""

    what: str
    expected: str
    found: str
    holds: bool


def rows(repeats: int = 400) -> Iterator[Row]:
    """Every acceptance figure, of `repeats` sweeps a cell."""
    apart, c = two_lambdas()
    yield Row("two λ: d/se less scipy.stats.ttest_rel", "0", f"{apart:.1e}", apart < 1e-9)
    yield Row("two λ: c", "1.96 ± .02", f"{c:.3f}", abs(c - 1.96) <= 0.02)
    c, dunnett = ten_rivals(), dunnett_critical()
    yield Row(
        f"ten equal independent rivals: c (scipy.stats.dunnett: {dunnett:.3f})",
        "2.70 ± .03",
        f"{c:.3f}",
        abs(c - 2.7) <= 0.03 and abs(c - dunnett) <= 0.03,
    )
    for n in (200, 1000, 5000):
        share = coverage_of_bands(n, repeats)
        yield Row(f"bands cover, n = {n:,}", "92.5–97.5 %", f"{share:.1%}", 0.925 <= share <= 0.975)
    share = coverage_of_bands(200, repeats, floor=False)
    yield Row("bands cover, n = 200, without the floor", "< 90 %", f"{share:.1%}", share < 0.9)
    for shape in SHAPES:
        share, _ = coverage_of_sets(shape, 1000, repeats)
        yield Row(f"set of λ* covers, {shape}", "≥ 92 %", f"{share:.1%}", share >= 0.92)
    for shape, n, most in (("peak +2", 1000, 16), ("peak +5", 5000, 6.5)):
        _, size = coverage_of_sets(shape, n, repeats)
        yield Row(
            f"λ in the set, {shape}, n = {n:,}", f"≤ {most} of 21", f"{size:.1f}", size <= most
        )
    honest, own, share = bias_and_band("peak +2", 1000, repeats)
    yield Row(
        "bias of the best score's gain, points", "about +.5", f"{own:+.2f}", 0.3 <= own <= 0.8
    )
    yield Row(
        "bias of the cross-fitted gain, points", "within ± .3", f"{honest:+.2f}", abs(honest) <= 0.3
    )
    yield Row("band covers the gain at λ̂", "≥ 95 %", f"{share:.1%}", share >= 0.95)
    lost, _, used = losses(1000, 200)
    share = float(np.mean(lost <= 0.5))
    yield Row("auto, n = 1,000: at most .5 point lost", "≥ 95 %", f"{share:.1%}", share >= 0.95)
    part = used.mean() / 51
    yield Row("auto: λ evaluated, of 51", "≤ 25 %", f"{part:.1%}", part <= 0.25)
    yield Row("auto: most λ evaluated", "≤ 12", f"{used.max()}", bool(used.max() <= 12))
    _, far, _ = losses(20_000, 200)
    share = float(np.mean(far <= 0.05))
    yield Row("auto, n = 20,000: λ within .05", "≥ 95 %", f"{share:.1%}", share >= 0.95)
    tested, points = constraint(1000, repeats)
    yield Row(
        "98 % constraint violated, by points alone", "about 42 %", f"{points:.1%}", points > 0.2
    )
    yield Row("98 % constraint violated", "about 2 %", f"{tested:.1%}", tested <= 0.05)
    tested, points = frontier(1000, repeats)
    yield Row(
        "frontier loses a member, by points alone", "about 80 %", f"{points:.1%}", points > 0.5
    )
    yield Row("frontier loses a member", "≤ 5 %", f"{tested:.1%}", tested <= 0.05)
    shipped = demo()
    held = shipped.difference(Lambda("0.4"))
    gain, width = 100 * held.value, 50 * (held.high - held.low)
    yield Row(
        "demo pair, 704 items: gain at λ = 0.4, points (bf16 on CPU: an item or two by machine)",
        "told, > 0",
        f"{gain:+.2f} ± {width:.2f}",
        shipped.n == 704 and held.low > 0 and held.p < 0.05,
    )
    bands, cross = speed()
    yield Row(
        "50,000 items × 21 λ: bands, set, choice (CPU)", "0.4 s", f"{bands:.2f} s", bands <= 2
    )
    yield Row("50,000 items × 21 λ: cross-fit (CPU)", "3.4 s", f"{cross:.2f} s", cross <= 5)


def main() -> int:
    print("| what | expected | found | |\n|---|---|---|---|")
    holds = True
    for row in rows():
        print(
            f"| {row.what} | {row.expected} | {row.found} | {'' if row.holds else '✗'} |",
            flush=True,
        )
        holds &= row.holds
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
