"""One part of a sweep that several processes share: every `world`-th λ of the schedule, from `rank`
on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pa_fast.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `rank` (from 0) of `world` equal parts.

    Raises:
        UsageError: `rank` is not below `world`.
    """

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"shard {self.rank}/{self.world} does not exist",
                f"shards count from 0 to {self.world - 1}",
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/8` is the third of eight parts."""
        if not (found := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)):
            raise UsageError(
                f"shard `{text}` is not I/N",
                "write for example 0/4, 1/4, 2/4 and 3/4 for four processes",
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """As file names spell it."""
        return f"{self.rank}-of-{self.world}"

    def of(self, points: Sequence[T]) -> list[T]:
        """This part of `points`; all parts together are all of them, each once."""
        return list(points[self.rank :: self.world])
