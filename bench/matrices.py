"""Equal matrices as two sides and a live copy, for ops whose cost hangs on what differs: density,
or rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pa_kernels import Lerp

from bench.cases import Case
from bench.table import counted, record, timed

SHAPE = (2048, 5632)


@dataclass(frozen=True)
class Matrices:
    """Sides and live copy, and the generator for what else is drawn."""

    base: list[torch.Tensor]
    instruct: list[torch.Tensor]
    live: list[torch.Tensor]
    generator: torch.Generator

    @classmethod
    def drawn(cls, count: int) -> Matrices:
        generator = torch.Generator().manual_seed(0)
        base = [normal(generator, *SHAPE) for _ in range(count)]
        instruct = [b + normal(generator, *SHAPE, scale=4e-4) for b in base]
        return cls(base, instruct, [b.clone() for b in base], generator)

    @property
    def count(self) -> int:
        return sum(b.numel() for b in self.base)

    def beside_dense(
        self,
        benchmark: Any,
        case: Case,
        switches: Mapping[str, tuple[int, Callable[[float], object]]],
    ) -> None:
        """Time `switches`, each with the bytes that it keeps, beside dense ones, and record them
        under the name of their op.

        Low rank and chosen sparse deltas are deltas of their own: each op's file compares the bits
        of its switches first.
        """
        dense = Lerp(self.live, self.base, self.instruct).run_
        dense(0.3)
        assert torch.equal(self.live[0], torch.lerp(self.base[0], self.instruct[0], 0.3)), (
            "wrong bits: no speed"
        )
        kept = {
            "dense": 4 * self.count,
            **{name: bytes_ for name, (bytes_, _) in switches.items()},
            "dense, again": 4 * self.count,
        }
        runs = {
            "dense": dense,
            **{name: run for name, (_, run) in switches.items()},
            "dense, again": dense,
        }
        lams = iter([k / 1000 for k in range(1, 1000)] * 99)

        def at_next(run: Callable[[float], object]) -> Callable[[], object]:
            return lambda: run(next(lams))

        ways = timed({name: at_next(run) for name, run in runs.items()}, case.rounds_here)
        name = next(iter(switches)).rsplit(" ", 1)[0]
        record(
            benchmark,
            case.target,
            f"{name} switches of {counted(self.count)} bf16 weights",
            [replace(way, kept_bytes=kept[way.name]) for way in ways],
            against="dense",
            noise=("dense", "dense, again"),
            headline=", ".join(
                f"{way.name} {ways[0].median_s / way.median_s:.1f} × as fast" for way in ways[1:-1]
            ),
        )


def normal(generator: torch.Generator, *shape: int, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(scale).bfloat16()
