"""The measurement of speeds, by `pa-fast bench`, `make bench` and `make gpu` alike.

Ways of doing one thing are timed in turn, so that what disturbs the machine disturbs all of them,
and compared as ratios of medians. A way that is timed a second time, under the name `…, again`,
shows the noise. Bits come first: what fails `check_bits` has no speed.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pa_kernels import reference
from torch import Tensor

from pa_fast.errors import WeightsError

Work = Callable[[], Any]

SPOT = 1 << 16
"""Elements that are compared at each spot."""

_HINT = (
    "run the tests (`make test`, on a GPU `make gpu`): this is a fault of pa_fast, or of the"
    " machine"
)


class WrongBits(WeightsError):
    """Raised if what was about to be timed wrote something else than the contract."""


def require_bits(right: bool, what: str) -> None:
    """Raise WrongBits unless `right`; `what` names the way that was compared."""
    if not right:
        raise WrongBits(f"{what}: wrong bits, so no speed of it is given", _HINT)


def check_bits(what: str, live: Sequence[Tensor], expected: Callable[[int, slice], Tensor]) -> None:
    """Compare live tensors with `expected(t, slice)`, elements of flat tensor t on the CPU, at the
    head, middle and tail of the first, the last, the largest and the smallest.

    Raises:
        WrongBits: they differ.
    """
    for t, span in spots([tensor.numel() for tensor in live]):
        actual, wanted = live[t].detach().view(-1)[span].cpu(), expected(t, span)
        differ = ~reference.same_bits(actual, wanted)
        if differ.any():
            first = int(differ.nonzero()[0])
            raise WrongBits(
                f"{what}: tensor {t}, element {span.start + first} is {actual[first].item()},"
                f" expected {wanted[first].item()}, so no speed of it is given",
                _HINT,
            )


def spots(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (tensor, slice) to compare. Slices begin at multiples of SPOT, where the noise of
    stochastic rounding may be asked for."""
    order = sorted(range(len(sizes)), key=lambda t: sizes[t])
    for t in dict.fromkeys((0, len(sizes) - 1, order[-1], order[0])):
        for unit in dict.fromkeys((0, sizes[t] // 2 // SPOT, (sizes[t] - 1) // SPOT)):
            yield t, slice(unit * SPOT, min((unit + 1) * SPOT, sizes[t]))


@dataclass(frozen=True)
class Sample:
    """One run of a way. None is what was not looked at.

    Attributes:
        cpu_s: processor seconds of this process and its children.
        moved_bytes: read and written.
        peak_bytes: most anonymous memory.
    """

    wall_s: float
    cpu_s: float | None = None
    moved_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Way:
    """One contender, or one ceiling, of one case: what to time, and once timed its seconds.

    Attributes:
        name: of the row; `repeated` gives the same version a name of its own.
        work: does `runs` runs; None once it is timed.
        seconds: wall, one per round, of a single run.
        cpu_s: processor seconds of a run, median.
        moved_bytes: read and written by one run, as counted from the shapes.
        bytes_per_weight: kept in all, the live copy included.
        kept_bytes: kept beside the live copy.
        peak_bytes: most anonymous memory.
        wrong_share: share of the weights that are not the contract's bits.
        effective_lambda: λ as rounding left it.
        note: version and flags.
    """

    name: str
    work: Work | None = field(default=None, repr=False, compare=False)
    runs: int = field(default=1, repr=False, compare=False)
    moved_bytes: int | None = None
    bytes_per_weight: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    wrong_share: float | None = None
    effective_lambda: float | None = None
    note: str = ""
    seconds: tuple[float, ...] = ()
    cpu_s: float | None = None

    @property
    def repeated(self) -> Way:
        """The same once more: what its time differs by is noise."""
        return dataclasses.replace(self, name=f"{self.name}, again")

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Relative spread of its rounds: (slowest − fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s

    @property
    def gbps(self) -> float | None:
        """10⁹ bytes moved per second, or None where no bytes are counted."""
        return None if self.moved_bytes is None else self.moved_bytes / self.median_s / 1e9

    def sampled(self, samples: Sequence[Sample]) -> Way:
        """The way with what `samples` of its runs say."""
        seconds = tuple(sample.wall_s for sample in samples)
        cpu = [sample.cpu_s for sample in samples if sample.cpu_s is not None]
        moved = [sample.moved_bytes for sample in samples if sample.moved_bytes is not None]
        peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
        return dataclasses.replace(
            self,
            work=None,
            seconds=seconds,
            cpu_s=statistics.median(cpu) if cpu else self.cpu_s,
            moved_bytes=round(statistics.median(moved)) if moved else self.moved_bytes,
            peak_bytes=max(peaks) if peaks else self.peak_bytes,
        )


def wait() -> None:
    """Wait until the GPU, if there is one, has nothing to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def by_wall(work: Work) -> Sample:
    """Run `work` from an idle device to an idle device, as a caller sees it."""
    wait()
    used, began = _processor_s(), time.perf_counter()
    work()
    wait()
    return Sample(time.perf_counter() - began, _processor_s() - used)


HEAD_START_CYCLES = 4_000_000
"""Of the device's clock: 2 ms at 2 GHz."""


def by_events(work: Work) -> Sample:
    """Run `work` between two events on the stream that it is sent to.

    The device is kept busy for HEAD_START_CYCLES before the first event, so that the host, which
    takes 50 to 70 µs for a launch, is ahead of it: only gaps that it leaves after that count.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    work()
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) / 1000)


def by_itself(work: Work) -> Sample:
    """Run `work` that returns its own sample."""
    sample: Sample = work()
    return sample


def timed(
    ways: Sequence[Way],
    rounds: int,
    *,
    measure: Callable[[Work], Sample] = by_wall,
    warm: int = 1,
    turn: bool = True,
    after: Callable[[str], object] = lambda name: None,
) -> dict[str, Way]:
    """Time every way in each round.

    Args:
        measure: runs a way's work once.
        warm: rounds before those that count: first touch, compilation, clocks.
        turn: every other round runs backwards.
        after: called with a way's name after every run, outside its time.

    Returns: by name, each with its seconds.
    """
    samples: dict[str, list[Sample]] = {way.name: [] for way in ways}
    for number in range(-warm, rounds):
        for way in ways[:: -1 if turn and number % 2 else 1]:
            assert way.work is not None, f"`{way.name}` has nothing to time"
            sample = measure(way.work)
            after(way.name)
            if number >= 0:
                samples[way.name].append(
                    dataclasses.replace(
                        sample,
                        wall_s=sample.wall_s / way.runs,
                        cpu_s=None if sample.cpu_s is None else sample.cpu_s / way.runs,
                    )
                )
    return {way.name: way.sampled(samples[way.name]) for way in ways}


@dataclass(frozen=True)
class Table:
    """The ways of one case of one target.

    Attributes:
        target: its row, such as "P7", or "".
        case: what was done to what: "merge to disk, 1.06 G bf16 weights".
        against: name of the way that all ratios are to.
        goal: the target's words.
        headline: what was measured, in the same words.
        met: whether that meets the goal; None where nobody judges.
        ceilings: GB/s of "copy" and "stream", of which others are shares; empty where not measured.

    Raises:
        ValueError: `against` names no way, two ways have one name, or one was not timed.
    """

    target: str
    case: str
    ways: tuple[Way, ...]
    against: str
    goal: str = ""
    headline: str = ""
    met: bool | None = None
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [way.name for way in self.ways]
        untimed = [way.name for way in self.ways if not way.seconds]
        if untimed:
            raise ValueError(f"{self.title}: not timed: {untimed}")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.title}: two ways have one name: {names}")
        if self.against not in names:
            raise ValueError(f"{self.title}: no way is named {self.against!r}; there are {names}")

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
    def noise(self) -> float | None:
        """Seconds of the second timing over those of the first, of the way that was timed twice."""
        seconds = {way.name: way.median_s for way in self.ways}
        return next(
            (
                repeat_s / seconds[name.removesuffix(", again")]
                for name, repeat_s in seconds.items()
                if name.endswith(", again")
            ),
            None,
        )

    @property
    def noise_text(self) -> str:
        return "" if self.noise is None else f"{self.noise:.3f}"

    def to_json(self) -> dict[str, Any]:
        ways = [
            {
                name: value
                for name, value in vars(way).items()
                if name not in ("work", "runs") and value not in (None, "")
            }
            for way in self.ways
        ]
        return {**vars(self), "ways": ways, "ceilings": dict(self.ceilings)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Table:
        ways = (Way(**{**way, "seconds": tuple(way["seconds"])}) for way in document["ways"])
        return cls(**{**document, "ways": tuple(ways)})

    def columns(self) -> dict[str, list[str]]:
        """Return what people read, by its heading; columns that no way fills are left out."""
        cells: dict[str, Callable[[Way], str]] = {
            "way": lambda way: way.name,
            "median": lambda way: format_timing(way.median_s),
            "lowest": lambda way: format_timing(min(way.seconds)),
            f"× {self.against}": lambda way: f"{self.ratio(way):.3g}",
            "GB/s": lambda way: "" if way.gbps is None else f"{way.gbps:.1f}",
            **{f"of {name}": self._share_of(name) for name in self.ceilings},
            "bytes moved": lambda way: format_size(way.moved_bytes),
            "bytes per weight": lambda way: _number(way.bytes_per_weight, ".3f"),
            "processor": lambda way: "" if way.cpu_s is None else format_timing(way.cpu_s),
            "peak memory": lambda way: format_size(way.peak_bytes),
            "kept": lambda way: format_size(way.kept_bytes),
            "wrong weights": lambda way: _number(way.wrong_share, ".3%"),
            "effective λ": lambda way: _number(way.effective_lambda, ".4f"),
            "note": lambda way: way.note,
        }
        columns = {name: [cell(way) for way in self.ways] for name, cell in cells.items()}
        return {name: column for name, column in columns.items() if any(column)}

    def _share_of(self, ceiling: str) -> Callable[[Way], str]:
        gbps = self.ceilings[ceiling]
        return lambda way: "" if way.gbps is None else f"{way.gbps / gbps:.1%}"

    @property
    def verdict(self) -> str:
        """The headline, with whether the goal is met where that was judged."""
        judged = "" if self.met is None else ": met" if self.met else ": NOT MET"
        return f"{self.headline}{judged}"

    def text(self) -> str:
        """The table for a terminal."""
        columns = self.columns()
        widths = [max(map(len, [name, *column])) for name, column in columns.items()]
        lines = [
            "  ".join(
                cell.ljust(width) if n in (0, len(row) - 1) else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in [tuple(columns), *zip(*columns.values())]
        ]
        head = [f"{self.title}; {self.rounds}"]
        head += [f"goal: {self.goal}"] * bool(self.goal)
        head += [f"here: {self.verdict}"] * bool(self.headline)
        head += [f"the same version timed twice: {self.noise_text}"] * bool(self.noise_text)
        return "\n".join([*head, *(f"  {line}" for line in lines)])


def format_timing(seconds: float) -> str:
    """Seconds in three digits: 2.31 s, 48.2 ms, 7.01 µs."""
    scale, unit = (1, "s") if seconds >= 0.1 else (1e3, "ms") if seconds >= 1e-4 else (1e6, "µs")
    return f"{seconds * scale:#.3g} {unit}".replace(". ", " ")


def format_size(count: int | None) -> str:
    """Bytes in three digits and decimal units; nothing for None."""
    return "" if count is None else f"{format_large(count)}B"


def format_large(count: int) -> str:
    """A large number in three digits: 1.06 G, 110 M, 62.5 k."""
    scale, unit = (1e9, "G") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "k")
    return f"{count / scale:#.3g} {unit}".replace(". ", " ")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _processor_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
