"""How a merge is rounded to its dtype: to nearest, or stochastically with noise that belongs to the
element."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from pa_fast.errors import UsageError

MODES = ("nearest", "stochastic")


@dataclass(frozen=True)
class Rounding:
    """`nearest`, ties to even; or `stochastic`: up or down by noise of (seed, tensor name, index),
    so that the weights follow λ on average where nearest drops updates of less than half a unit in
    the last place.

    Example:
        rounding = pa_fast.Rounding("stochastic", seed=0)
        lm = pa_fast.load(base, instruct, rounding=rounding)

    Raises:
        UsageError: no such mode, or no such seed.
    """

    mode: str = "nearest"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                f"rounding `{self.mode}` is not available", f"available: {', '.join(MODES)}"
            )
        if not self.is_stochastic:
            if self.seed is not None:
                raise UsageError(
                    f"seed {self.seed} with rounding `nearest`",
                    "only stochastic rounding draws: leave out one of both",
                )
            return
        seed = 0 if self.seed is None else self.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UsageError(
                f"seed {self.seed!r} of stochastic rounding", "give a number from 0 to 4294967295"
            )
        object.__setattr__(self, "seed", seed)

    @classmethod
    def of(cls, rounding: str | Rounding, seed: int | None = None) -> Rounding:
        """Return the rounding that `rounding`, a mode or a value of this class, and `seed` say.

        Raises:
            UsageError: no such mode or seed, or a seed beside a value that has its own.
        """
        if not isinstance(rounding, Rounding):
            return cls(rounding, seed)
        if seed is not None and seed != rounding.seed:
            raise UsageError(f"seed {seed} beside {rounding!r}", "give the seed in one of them")
        return rounding

    @property
    def is_stochastic(self) -> bool:
        """True if each element is rounded by its own noise."""
        return self.mode == "stochastic"

    def key(self, name: str) -> int | None:
        """Return the 32-bit key of the noise of checkpoint tensor `name`, crc32(name) ^ seed; None
        where rounding is to nearest."""
        return None if self.seed is None else zlib.crc32(name.encode()) ^ self.seed

    def __str__(self) -> str:
        return self.mode if self.seed is None else f"{self.mode}, seed {self.seed}"


NEAREST = Rounding()
