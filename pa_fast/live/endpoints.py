"""What the live tensors must be at λ = 0 and 1, by the word of somebody else than the store that
writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from pa_kernels.cores import over, over_cores
from pa_kernels.reference import LIVE_DTYPES

from pa_fast.base import Lambda
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.binding import Binding, first_overlap, same_merge
from pa_fast.live.encoding import OnRead, check_finite, is_finite
from pa_fast.stores.composite import CompositeStore
from pa_fast.stores.store import Store, spans

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FirstRows:
    """An end that speaks for the first rows of its live tensor alone: of vocabulary rows that one
    side has."""

    tensor: torch.Tensor


Endpoints = Mapping[float, Mapping[str, Union["torch.Tensor", FirstRows]]]
"""λ → live name → the tensor that it is there, of the live shape: in any of bf16, fp16, fp32 where
it is interpolated."""


class CheckedEndpoints(dict[float, dict[str, "torch.Tensor"]]):
    """`Endpoints` of which each can be compared: every live name, contiguous."""

    @classmethod
    def of(cls, ends: Endpoints, made: Sequence[Binding]) -> CheckedEndpoints:
        """`ends` for these live tensors.

        Raises:
            UsageError: not λ → name → tensor.
            WeightsError: an end has other names or another shape or dtype than the live tensors, or
                is one of them.
        """
        if isinstance(ends, CheckedEndpoints):
            return ends
        if not isinstance(ends, Mapping) or not all(
            isinstance(named, Mapping) for named in ends.values()
        ):
            raise UsageError(
                f"ends are a {type(ends).__name__}",
                "pass {λ: {name: tensor}}, such as {0.0: base, 1.0: instruct}",
            )
        by_name = {name: binding for binding in made for name in binding.names}
        found = cls()
        for key, named in ends.items():
            lam = float(Lambda(key))
            odd = sorted(by_name.keys() ^ named.keys())
            if odd:
                where = (
                    "is live, but has no end"
                    if odd[0] in by_name
                    else "has an end, but is not live"
                )
                raise WeightsError(
                    f"`{odd[0]}` {where} at λ = {lam:g}",
                    "give an end to every live name, and to no other",
                )
            found[lam] = {
                name: _comparable(name, lam, end, by_name[name]) for name, end in named.items()
            }
        places = [("live", binding.name, binding.live) for binding in made]
        places += [
            (f"λ = {lam:g}", name, end)
            for lam, tensors in found.items()
            for name, end in tensors.items()
        ]
        overlap = first_overlap(places)
        if overlap is not None:
            where, name, _ = next(place for place in overlap if place[0] != "live")
            raise WeightsError(
                f"the end of `{name}` at {where} lies in live memory: it would be compared with"
                " itself",
                "pass the tensors as they were loaded, or copies of them",
            )
        return found


def _comparable(name: str, lam: float, end: object, binding: Binding) -> torch.Tensor:
    import torch

    tensor = end.tensor if isinstance(end, FirstRows) else end
    what = f"the end of `{name}` at λ = {lam:g}"
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{what} is a {type(tensor).__name__}", "pass tensors")
    shape, live = tuple(tensor.shape), tuple(binding.live.shape)
    rows = (
        isinstance(end, FirstRows)
        and len(shape) == len(live)
        and shape[1:] == live[1:]
        and 0 < shape[0] <= live[0]
    )
    if shape != live and not rows:
        raise WeightsError(
            f"{what} is {list(shape)}, the live tensor {list(live)}",
            "an end has the shape of its live tensor",
        )
    if tensor.dtype != binding.live.dtype and not {tensor.dtype, binding.live.dtype} <= set(
        LIVE_DTYPES
    ):
        raise WeightsError(
            f"{what} is {tensor.dtype}, the live tensor {binding.live.dtype}",
            "only bf16, fp16 and fp32 are compared in any mix",
        )
    return tensor.detach().contiguous()


def differing(binding: Binding, lam: float, ends: CheckedEndpoints, span: slice) -> str | None:
    """A name of `binding` whose elements `span` are not those of `ends` at λ, or None where all
    are."""
    seen: set[int] = set()
    for name in binding.names:
        end = ends[lam][name]
        if end.data_ptr() in seen:
            continue
        seen.add(end.data_ptr())
        flat = end.view(-1)[span]
        found = binding.live.detach().view(-1)[span][: flat.numel()]
        if not same_merge(found, _rounded(flat.to(found.device), binding)):
            return name
    return None


def check(made: Sequence[Binding], lam: float, ends: CheckedEndpoints) -> None:
    """Raise WeightsError unless the live tensors are bit for bit what `ends` has at λ. Cost: reads
    both once."""
    at = [(binding, span) for binding in made for span in spans(binding.live)]
    if at:
        refuse(over(lambda one: differing(one[0], lam, ends, one[1]), at, made[0].live), lam)


def refuse(names: Iterable[str | None], lam: float) -> None:
    """Raise WeightsError if there is a name among `names`."""
    for name in names:
        if name is not None:
            raise WeightsError(
                f"endpoint check failed: at λ = {lam:g} live tensor `{name}` is not, bit for bit,"
                " what it must be there",
                "wrong pairing, tying or a dtype, or something else wrote to it; of a model that"
                " load made, please report the architecture",
            )


def _rounded(end: torch.Tensor, binding: Binding) -> torch.Tensor:
    if end.dtype == binding.live.dtype and binding.intermediate_dtype is None:
        return end
    return end.to(binding.intermediate_dtype or binding.live.dtype).to(binding.live.dtype)


# --- first write
#
# The first write on a CPU of a store that keeps the sources as they are: all that is asked of a
# piece of them, while it is in cache.


@dataclass(frozen=True)
class FirstWrite:
    """What the pieces are held against as they are written.

    Attributes:
        ends: what the live tensors must be at which λ.
        allow_nonfinite: let NaN and infinity in the sources pass.
        on_read: told of each piece of the sources.
    """

    ends: CheckedEndpoints
    allow_nonfinite: bool
    on_read: OnRead | None = None

    @staticmethod
    def fits(made: Sequence[Binding], store: Store) -> bool:
        """Whether `store` can write these tensors piece by piece."""
        return store.keeps_sources and all(
            b.live.device.type == "cpu" for b in made if b.live.dtype in LIVE_DTYPES
        )

    def write_(self, store: CompositeStore, floats: Sequence[Binding]) -> None:
        """Write λ = 0 into every live float tensor, by way of the other λ of `ends`.

        Cost: reads both sources once, writes the live tensors once; what is read again lies in
            cache.

        Raises:
            DataError: a source is not finite.
            WeightsError: an end is not what it must be.
        """
        lams = [*sorted(self.ends.keys() - {0.0}), 0.0]

        def write(at: tuple[int, slice]) -> None:
            t, span = at
            binding = floats[t]
            for side, tensor in binding.sources.items():
                if not self.allow_nonfinite and not is_finite(tensor.view(-1)[span]):
                    check_finite([(side, binding.name, tensor)])
                if self.on_read is not None:
                    self.on_read(tensor, span.start, tensor.view(-1)[span])
            for lam in lams:
                store.write_(t, span, lam)
                if lam in self.ends:
                    refuse([differing(binding, lam, self.ends, span)], lam)

        over_cores(write, [(t, span) for t in range(len(floats)) for span in store.spans(t)])
