"""One run of stages: where, with which clock and sizes, and what may be compared with what."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from bench.gpu.clock import Clock, Work, clock_of
from bench.gpu.ledger import Ledger, Row
from bench.gpu.scale import FULL, Scale, free_bytes

T = TypeVar("T")

WARM = 2
"""Rounds before those that count: compilation, first touch, clocks."""


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    Attributes:
        moved_bytes: read and written by one switch.
        work: does `switches` of them.
        bytes_per_weight: kept in all, the live copy included.
    """

    moved_bytes: int
    work: Work
    switches: int = 1
    bytes_per_weight: float | None = None
    note: str = ""


@dataclass
class Run:
    """Device, sizes, ledger and time of a run, and its two ceilings once they are known.

    Attributes:
        until: `time.monotonic()` at which no further stage starts.
        copy_gbps, stream_gbps: a device copy; the best known stream of two reads and a write over
            flat buffers.
    """

    device: torch.device
    ledger: Ledger
    scale: Scale = FULL
    rounds: int = 9
    until: float = math.inf
    clock: Clock = field(init=False)
    copy_gbps: float = math.nan
    stream_gbps: float = math.nan

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    @property
    def multiprocessors(self) -> int:
        return (
            2
            if self.rehearsal
            else torch.cuda.get_device_properties(self.device).multi_processor_count
        )

    def some(self, items: Iterable[T]) -> list[T]:
        """All of them; in a rehearsal the first, which walks through the same code."""
        return list(items)[: 1 if self.rehearsal else None]

    def room(self) -> int:
        """Bytes of device memory that a stage may take."""
        return free_bytes(self.device)

    def random(self, *shape: int, std: float = 0.02) -> torch.Tensor:
        """Normal bf16 weights on the device: zeros would run faster."""
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, std)

    def near(self, base: torch.Tensor, relative: float) -> torch.Tensor:
        """`base`, of any size, with a normal step of `relative` times its norm, rounded to bf16."""
        made = torch.empty_like(base)
        for source, out in zip(base.view(-1).split(1 << 26), made.view(-1).split(1 << 26)):
            out.copy_(
                torch.empty(source.shape, device=self.device)
                .normal_(0, 0.02 * relative)
                .add_(source)
            )
        return made

    def medians(
        self, contenders: Mapping[str, Contender], clock: Clock | None = None
    ) -> dict[str, list[float]]:
        """Seconds per switch of each, in turn, round by round, after rounds to warm up."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        rounds = self.rounds if not self.rehearsal else 1
        for round_ in range(rounds + (0 if self.rehearsal else WARM)):
            for name, contender in contenders.items():
                took = (clock or self.clock)(contender.work) / contender.switches
                if self.rehearsal or round_ >= WARM:
                    seconds[name].append(took)
        return seconds

    def time(
        self,
        stage: str,
        contenders: Mapping[str, Contender],
        weights: int,
        against: str = "",
        clock: Clock | None = None,
    ) -> dict[str, Row]:
        """Time all of them in turn and record a row for each."""
        seconds = self.medians(contenders, clock)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        return {
            name: self.ledger.add(
                Row(
                    stage,
                    name,
                    weights=weights,
                    moved_bytes=contender.moved_bytes,
                    bytes_per_weight=contender.bytes_per_weight,
                    ms=middle[name] * 1000,
                    spread=(max(seconds[name]) - min(seconds[name])) / middle[name],
                    gbps=(gbps := contender.moved_bytes / middle[name] / 1e9),
                    of_copy=gbps / self.copy_gbps,
                    of_stream=gbps / self.stream_gbps,
                    ratio=middle[name] / middle[against] if against else None,
                    against=against,
                    note=contender.note,
                )
            )
            for name, contender in contenders.items()
        }

    def choose(
        self, stage: str, rows: Mapping[str, Row], shipped: str, names: Sequence[str], setting: str
    ) -> str:
        """Record which of `names` is fastest, and whether that is reason to change `setting`: by
        more than twice the noise.

        The noise is what `<shipped>, again` differs from `shipped` by, 0.5 % at least. Returns the
        fastest.
        """
        took = {name: rows[name].ms or math.nan for name in [shipped, f"{shipped}, again", *names]}
        noise = max(abs(took[f"{shipped}, again"] / took[shipped] - 1), 0.005)
        best = min(names, key=lambda name: took[name])
        gain = took[shipped] / took[best] - 1
        change = "change" if gain > 2 * noise else "keep"
        self.ledger.say(
            stage,
            f"{change} {setting}: {best} is {gain:+.1%} faster than {shipped} (noise {noise:.1%})",
        )
        return best
