"""What the live tensors must be at λ = 0 and 1, by the word of somebody else than the store that writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pa_kernels.cores import over

from pa_fast.delta.dense import spans
from pa_fast.errors import WeightsError
from pa_fast.live.binding import Binding, as_integers, same_bits

if TYPE_CHECKING:
    import torch

Ends = Mapping[float, Mapping[str, "torch.Tensor"]]
"""λ → live name → the contiguous tensor that it is there, in any float dtype; its first rows where it is shorter."""


def differing(binding: Binding, lam: float, ends: Ends, span: slice) -> str | None:
    """A name of `binding` whose elements `span` are not those of `ends` at λ, or None where all are."""
    seen: set[int] = set()
    for name in binding.names:
        end = ends[lam].get(name)
        if end is None:
            return name
        if end.data_ptr() in seen:
            continue
        seen.add(end.data_ptr())
        flat = end.view(-1)[span]
        found = binding.live.detach().view(-1)[span][: flat.numel()]
        if not _equal(found, _rounded(flat.to(found.device), binding)):
            return name
    return None


def check(made: Sequence[Binding], lam: float, ends: Ends) -> None:
    """Raise WeightsError unless the live tensors are bit for bit what `ends` has at λ. Cost: reads both once."""
    at = [(binding, span) for binding in made for span in spans(binding.live)]
    if at:
        refuse(over(lambda one: differing(one[0], lam, ends, one[1]), at, made[0].live), lam)


def refuse(names: Iterable[str | None], lam: float) -> None:
    """Raise WeightsError if there is a name among `names`."""
    for name in names:
        if name is not None:
            raise WeightsError(
                f"endpoint check failed: at λ = {lam:g} live tensor `{name}` is not, bit for bit, what it must be there",
                "wrong pairing, tying or a dtype; please report the architecture",
            )


def _equal(found: torch.Tensor, end: torch.Tensor) -> bool:
    """Same bits, but for the payload of a NaN, which no conversion promises to keep."""
    if same_bits(found, end):
        return True
    there = end.isnan() & found.isnan() if end.is_floating_point() else None
    return there is not None and bool((there | (as_integers(found) == as_integers(end))).all())


def _rounded(end: torch.Tensor, binding: Binding) -> torch.Tensor:
    if end.dtype == binding.live.dtype and binding.via is None:
        return end
    return end.to(binding.via or binding.live.dtype).to(binding.live.dtype)
