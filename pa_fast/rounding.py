"""Rounding of a merge to its dtype: to nearest, or stochastic with noise that is a function of the
element."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from pa_fast.errors import UsageError

MODES = ("nearest", "stochastic")
_EXAMPLE = "stochastic, seed 1"


@dataclass(frozen=True)
class Rounding:
    """`nearest`, ties to even; or `stochastic`: up or down by noise of (seed, tensor name,
    element), so that the weights follow λ on average where nearest loses updates of less than half
    a unit in the last place.

    Example:
        lm = pa_fast.load("base", "instruct", rounding=pa_fast.Rounding("stochastic", seed=1))

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
        """Return the rounding of `rounding`, a mode or a value of this class, and `seed`.

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
        """True if elements are rounded with noise."""
        return self.mode == "stochastic"

    def key(self, name: str) -> int | None:
        """Return the key of the noise of checkpoint tensor `name`, 32 bits: crc32(name) ^ seed;
        None if there is no noise."""
        return None if self.seed is None else zlib.crc32(name.encode()) ^ self.seed

    @classmethod
    def parse(cls, text: str) -> Rounding:
        """Return the rounding of which `text` is the `str`.

        Raises:
            UsageError: it is none.
        """
        mode, _, seed = text.partition(", seed ")
        if seed and not (seed.isascii() and seed.isdecimal()):
            raise UsageError(f"rounding `{text}` is not available", f"such as: {_EXAMPLE}")
        return cls(mode, int(seed) if seed else None)

    def __str__(self) -> str:
        return self.mode if self.seed is None else f"{self.mode}, seed {self.seed}"


NEAREST = Rounding()
