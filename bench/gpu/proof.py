"""Bits of what is about to be timed, against the reference: no speed is printed for a wrong
result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 16


class WrongBits(Exception):
    """A contender wrote something else than the contract; the message says which one, where."""


def spots(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(tensor, slice) to compare: head, middle and tail of the first, the last, the largest and the
    smallest tensor.

    They begin at multiples of SAMPLE, where the noise of stochastic rounding may be asked for.
    """
    order = sorted(range(len(sizes)), key=lambda t: sizes[t])
    for t in dict.fromkeys((0, len(sizes) - 1, order[-1], order[0])):
        for place in dict.fromkeys((0, sizes[t] // 2 // SAMPLE, (sizes[t] - 1) // SAMPLE)):
            yield t, slice(place * SAMPLE, min((place + 1) * SAMPLE, sizes[t]))


def prove(what: str, out: Sequence[Tensor], expected: Callable[[int, slice], Tensor]) -> None:
    """Raise WrongBits unless `out` holds, at the spots, the bits of `expected(t, slice)`: flat
    tensor t's, on the CPU."""
    for t, span in spots([w.numel() for w in out]):
        found, wanted = out[t].detach().view(-1)[span].cpu(), expected(t, span)
        differ = found.view(torch.int16) != wanted.view(torch.int16)
        if differ.any():
            at = int(differ.nonzero()[0])
            raise WrongBits(
                f"{what}: tensor {t}, element {span.start + at} is {found[at].item()}, expected"
                f" {wanted[at].item()}"
            )


def poison(out: Sequence[Tensor]) -> None:
    """Fill live tensors with what no switch writes."""
    for w in out:
        w.fill_(9)
