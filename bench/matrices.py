"""Equal matrices as two sides and a live copy, for ops whose cost hangs on what differs: density,
or rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pa_kernels import Lerp

from bench.cases import Case
from bench.run import Run
from pa_fast.throughput.harness import Way, format_large, require_bits

SHAPE = (2048, 5632)
SwitchCall = Callable[[float], object]


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
        self, run: Run, case: Case, name: str, switches: Mapping[str, tuple[int, SwitchCall]]
    ) -> None:
        """Time `switches`, each with the bytes that it keeps, beside dense ones, and record them as
        switches of `name`.

        Low rank and chosen sparse deltas are deltas of their own: each op's file compares the bits
        of its switches first.
        """
        dense = Lerp(self.live, self.base, self.instruct).run_
        dense(0.3)
        require_bits(
            torch.equal(self.live[0], torch.lerp(self.base[0], self.instruct[0], 0.3)), "dense"
        )
        lams = itertools.cycle(k / 1000 for k in range(1, 1000))

        def way(name: str, kept_bytes: int, switch: SwitchCall) -> Way:
            return Way(name, lambda: switch(next(lams)), kept_bytes=kept_bytes)

        first = way("dense", 4 * self.count, dense)
        others = [way(name, *switch) for name, switch in switches.items()]
        ways = case.time(first, *others, first.repeated)
        run.record(
            case.target,
            f"{name} switches of {format_large(self.count)} bf16 weights",
            ways.values(),
            "dense",
            headline=", ".join(
                f"{name} {ways['dense'].median_s / ways[name].median_s:.1f} × as fast"
                for name in switches
            ),
        )


def normal(generator: torch.Generator, *shape: int, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(scale).bfloat16()
