"""The one way in which every benchmark reports: ways of doing one thing, timed in turn, as a table
of ratios.

A benchmark times its ways with `timed` (or `interleaved`), and says what it found with `record`.
The table is printed, and kept as plain JSON in pytest-benchmark's file, from which bench/report.py
makes CSV, Markdown, the block of docs/benchmarks.md and the figure.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KEY = "tables"
"""Where the tables of one benchmark lie in its `extra_info`."""


@dataclass(frozen=True)
class Way:
    """One contender, or one ceiling, of one case.

    Attributes:
        name: what it is; the same version timed a second time has a name of its own.
        seconds: wall, one per round.
        cpu_s: processor seconds of this process and its children, median.
        moved_bytes: read and written by one run, as counted from the shapes.
        peak_bytes: most anonymous memory.
        kept_bytes: kept beside the live copy.
        wrong_share: share of the weights that are not the contract's bits.
        effective_lambda: what λ was once rounded.
        note: version and flags.
    """

    name: str
    seconds: tuple[float, ...]
    cpu_s: float | None = None
    moved_bytes: int | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    wrong_share: float | None = None
    effective_lambda: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError(f"`{self.name}` was not timed: it has no seconds")

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def gbps(self) -> float | None:
        """10⁹ bytes moved per second, or None where no bytes are counted."""
        return None if self.moved_bytes is None else self.moved_bytes / self.median_s / 1e9


@dataclass(frozen=True)
class Table:
    """What one benchmark found about one case of one target; the arguments of `record`."""

    target: str
    case: str
    ways: tuple[Way, ...]
    against: str
    goal: str = ""
    headline: str = ""
    noise: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        names = [way.name for way in self.ways]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.target}, {self.case}: two ways have one name: {names}")
        missing = {self.against, *(self.noise or ())} - set(names)
        if missing:
            raise ValueError(
                f"{self.target}, {self.case}: no way is named {sorted(missing)}; there are {names}"
            )

    @property
    def title(self) -> str:
        return f"{self.target}: {self.case}" if self.target else self.case

    @property
    def rounds(self) -> str:
        count = len(self.ways[0].seconds)
        return f"medians of {count} rounds in turn" if count > 1 else "one round"

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def ratio(self, way: Way) -> float:
        """Seconds of `way` over seconds of the way that all are compared with: above 1 is
        slower."""
        return way.median_s / self.way(self.against).median_s

    @property
    def noise_ratio(self) -> float | None:
        """Seconds of the same version's second timing over its first."""
        return (
            self.way(self.noise[1]).median_s / self.way(self.noise[0]).median_s
            if self.noise
            else None
        )

    @property
    def noise_said(self) -> str:
        """That ratio in words, or nothing."""
        return "" if self.noise_ratio is None else f"{self.noise_ratio:.3f}"

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Table:
        """A table from its JSON form."""
        ways = tuple(Way(**{**way, "seconds": tuple(way["seconds"])}) for way in found["ways"])
        return cls(
            **{**found, "ways": ways, "noise": tuple(found["noise"]) if found["noise"] else None}
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows for people; columns that no way fills are left out."""
        columns: dict[str, Callable[[Way], str]] = {
            "way": lambda way: way.name,
            "median": lambda way: spelled(way.median_s),
            "lowest": lambda way: spelled(min(way.seconds)),
            f"× {self.against}": lambda way: f"{self.ratio(way):.3g}",
            "GB/s": lambda way: "" if way.gbps is None else f"{way.gbps:.1f}",
            "bytes moved": lambda way: bytes_of(way.moved_bytes),
            "processor": lambda way: "" if way.cpu_s is None else spelled(way.cpu_s),
            "peak memory": lambda way: bytes_of(way.peak_bytes),
            "kept": lambda way: bytes_of(way.kept_bytes),
            "wrong weights": lambda way: (
                "" if way.wrong_share is None else f"{way.wrong_share:.3%}"
            ),
            "effective λ": lambda way: (
                "" if way.effective_lambda is None else f"{way.effective_lambda:.4f}"
            ),
            "note": lambda way: way.note,
        }
        filled = {
            name: cells
            for name, of in columns.items()
            if any(cells := [of(way) for way in self.ways])
        }
        return list(filled), [list(row) for row in zip(*filled.values())]

    def text(self) -> str:
        """The table for a terminal."""
        header, rows = self.cells()
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = [
            "  ".join(
                cell.ljust(width) if n in (0, len(row) - 1) else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in [header, *rows]
        ]
        said = [f"{self.title}; {self.rounds}"]
        said += [f"goal: {self.goal}"] * bool(self.goal) + [f"here: {self.headline}"] * bool(
            self.headline
        )
        said += [f"the same version timed twice: {self.noise_said}"] * bool(self.noise)
        return "\n".join([*said, *(f"  {line}" for line in lines)])


def timed(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    moved_bytes: Mapping[str, int] | None = None,
    warm: bool = True,
    after: Callable[[], object] | None = None,
) -> list[Way]:
    """Time every way in each round, so that what disturbs the machine disturbs all; every other
    round runs backwards.

    Args:
        moved_bytes: what a run of each reads and writes, where that is counted.
        warm: run each once before the first round.
        after: what to do after every run, outside its time.
    """
    after = after or (lambda: None)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(-bool(warm), rounds):
        for name in list(ways)[:: -1 if round_ % 2 else 1]:
            used, began = _processor_s(), time.perf_counter()
            ways[name]()
            taken, spent = time.perf_counter() - began, _processor_s() - used
            after()
            if round_ >= 0:
                wall[name].append(taken)
                cpu[name].append(spent)
    moved = moved_bytes or {}
    return [
        Way(name, tuple(wall[name]), statistics.median(cpu[name]), moved.get(name)) for name in ways
    ]


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: bool = True,
    after: Callable[[], object] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Wall seconds of every way, one per round: `timed` for who needs no more."""
    return {way.name: way.seconds for way in timed(ways, rounds, None, warm, after)}


def record(
    benchmark: Any,
    target: str,
    case: str,
    ways: Sequence[Way],
    *,
    against: str,
    goal: str = "",
    headline: str = "",
    noise: tuple[str, str] | None = None,
) -> None:
    """Print what was found about a case, and keep it with the run; a benchmark may record several.

    Args:
        benchmark: pytest-benchmark's fixture, of which nothing else need be used.
        target: its row, such as "P7".
        case: what was done to what: "merge to disk, 1.06 G bf16 weights".
        against: the name of the way that all ratios are to.
        goal: the target's words.
        headline: what was measured, in the same words.
        noise: the two names of the same version timed twice.

    Raises:
        ValueError: `against` or `noise` names no way, or two ways have one name.
    """
    table = Table(target, case, tuple(ways), against, goal, headline, noise)
    benchmark.extra_info.setdefault(KEY, []).append(asdict(table))


def spelled(seconds: float) -> str:
    """Seconds in three digits: 2.31 s, 48.2 ms, 7.01 µs."""
    scale, unit = (1, "s") if seconds >= 0.1 else (1e3, "ms") if seconds >= 1e-4 else (1e6, "µs")
    return f"{seconds * scale:#.3g} {unit}".replace(". ", " ")


def bytes_of(count: int | None) -> str:
    """Bytes in three digits and decimal units; nothing for None."""
    return "" if count is None else f"{counted(count)}B"


def counted(count: int) -> str:
    """A large number in three digits: 1.06 G, 110 M, 62.5 k."""
    scale, unit = (1e9, "G") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "k")
    return f"{count / scale:#.3g} {unit}".replace(". ", " ")


def _processor_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
