"""A run of stages on a GPU: its device and sizes, and when a default is to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from bench.gpu.scale import FULL, Scale, free_bytes
from bench.run import Run, Skip
from pa_fast.throughput.harness import Way, by_events, by_wall, timed

T = TypeVar("T")

WARM = 2
"""Rounds before those that count: compilation, first touch, clocks."""


@dataclass
class GpuRun(Run):
    """In a rehearsal, without a GPU, every stage walks through the same code at tiny sizes."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scale: Scale = FULL
    rounds: int = 9

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"

    @property
    def multiprocessors(self) -> int:
        return (
            2
            if self.rehearsal
            else torch.cuda.get_device_properties(self.device).multi_processor_count
        )

    def some(self, items: Iterable[T]) -> list[T]:
        """All of them; in a rehearsal the first."""
        return list(items)[: 1 if self.rehearsal else None]

    def room(self) -> int:
        """Bytes of device memory that a stage may take."""
        return free_bytes(self.device)

    def layers(self, bytes_per_weight: float, share: float = 1.0) -> int:
        """Layers of an 8B model for which a `share` of the room is enough.

        Raises:
            Skip: not for one.
        """
        layers = self.scale.layers_for(int(self.room() * share), bytes_per_weight)
        if not layers:
            raise Skip("not one layer of an 8B model fits the device memory that is free")
        return layers

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

    def time(self, *ways: Way, whole: bool = False) -> dict[str, Way]:
        """Time `ways` in turn, by events of the device; `whole` calls as their caller sees them."""
        return timed(
            ways,
            1 if self.rehearsal else self.rounds,
            measure=by_wall if whole or self.rehearsal else by_events,
            warm=0 if self.rehearsal else WARM,
            turn=False,
        )

    def choose(
        self, ways: Mapping[str, Way], shipped: str, names: Sequence[str], setting: str
    ) -> str:
        """Record which of `names` is fastest, and whether that is reason to change `setting`: by
        more than twice the noise.

        The noise is what `<shipped>, again` differs from `shipped` by, 0.5 % at least. Returns the
        fastest.
        """
        took = {name: ways[name].median_s for name in (shipped, f"{shipped}, again", *names)}
        noise = max(abs(took[f"{shipped}, again"] / took[shipped] - 1), 0.005)
        best = min(names, key=lambda name: took[name])
        gain = took[shipped] / took[best] - 1
        change = "change" if gain > 2 * noise else "keep"
        self.note(
            f"{change} {setting}: {best} is {gain:+.1%} faster than {shipped} (noise {noise:.1%})"
        )
        return best
