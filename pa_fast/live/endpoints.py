"""Endpoints: what the live tensors must be at λ = 0 and 1, known independently of the store that
writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from pa_kernels.cores import over_cores, parallel_map
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
    """An endpoint of only the first rows of its live tensor: those of a vocabulary of which the
    other side has more rows."""

    tensor: torch.Tensor


Endpoints = Mapping[float, Mapping[str, Union["torch.Tensor", FirstRows]]]
"""λ → live name → the tensor that the live one must be there, of the same shape. Of interpolated
tensors the dtype may be any of bf16, fp16, fp32."""


class CheckedEndpoints(dict[float, dict[str, "torch.Tensor"]]):
    """`Endpoints` that can be compared: of every live name, each contiguous."""

    @classmethod
    def of(cls, endpoints: Endpoints, bound: Sequence[Binding]) -> CheckedEndpoints:
        """Return `endpoints`, checked against these live tensors.

        Raises:
            UsageError: not λ → name → tensor.
            WeightsError: an endpoint has another name, shape or dtype than the live tensors, or is
                one of them.
        """
        if isinstance(endpoints, CheckedEndpoints):
            return endpoints
        if not isinstance(endpoints, Mapping) or not all(
            isinstance(named, Mapping) for named in endpoints.values()
        ):
            raise UsageError(
                f"endpoints are a {type(endpoints).__name__}",
                "pass {λ: {name: tensor}}, such as {0.0: base, 1.0: instruct}",
            )
        by_name = {name: binding for binding in bound for name in binding.names}
        checked = cls()
        for key, named in endpoints.items():
            lam = float(Lambda(key))
            odd = sorted(by_name.keys() ^ named.keys())
            if odd:
                where = (
                    "is live, but has no endpoint"
                    if odd[0] in by_name
                    else "has an endpoint, but is not live"
                )
                raise WeightsError(
                    f"`{odd[0]}` {where} at λ = {lam:g}",
                    "give an endpoint to every live name, and to no other",
                )
            checked[lam] = {
                name: _comparable(name, lam, endpoint, by_name[name])
                for name, endpoint in named.items()
            }
        named_tensors = [("live", binding.name, binding.live) for binding in bound]
        named_tensors += [
            (f"λ = {lam:g}", name, endpoint)
            for lam, tensors in checked.items()
            for name, endpoint in tensors.items()
        ]
        overlap = first_overlap(named_tensors)
        if overlap is not None:
            where, name, _ = next(one for one in overlap if one[0] != "live")
            raise WeightsError(
                f"the endpoint of `{name}` at {where} lies in live memory: it would be"
                " compared with itself",
                "pass the tensors as they were loaded, or copies of them",
            )
        return checked


def _comparable(name: str, lam: float, endpoint: object, binding: Binding) -> torch.Tensor:
    import torch

    tensor = endpoint.tensor if isinstance(endpoint, FirstRows) else endpoint
    what = f"the endpoint of `{name}` at λ = {lam:g}"
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{what} is a {type(tensor).__name__}", "pass tensors")
    shape, live = tuple(tensor.shape), tuple(binding.live.shape)
    rows = (
        isinstance(endpoint, FirstRows)
        and len(shape) == len(live)
        and shape[1:] == live[1:]
        and 0 < shape[0] <= live[0]
    )
    if shape != live and not rows:
        raise WeightsError(
            f"{what} is {list(shape)}, the live tensor {list(live)}",
            "an endpoint has the shape of its live tensor",
        )
    if tensor.dtype != binding.live.dtype and not {tensor.dtype, binding.live.dtype} <= set(
        LIVE_DTYPES
    ):
        raise WeightsError(
            f"{what} is {tensor.dtype}, the live tensor {binding.live.dtype}",
            "only bf16, fp16 and fp32 are compared in any mix",
        )
    return tensor.detach().contiguous()


def differing_name(
    binding: Binding, lam: float, endpoints: CheckedEndpoints, span: slice
) -> str | None:
    """Return a name of `binding` whose elements `span` differ from those of `endpoints` at λ, or
    None if there is none."""
    seen: set[int] = set()
    for name in binding.names:
        endpoint = endpoints[lam][name]
        if endpoint.data_ptr() in seen:
            continue
        seen.add(endpoint.data_ptr())
        flat = endpoint.view(-1)[span]
        elements = binding.live.detach().view(-1)[span][: flat.numel()]
        if not same_merge(elements, _rounded(flat.to(elements.device), binding)):
            return name
    return None


def check_live(bound: Sequence[Binding], lam: float, endpoints: CheckedEndpoints) -> None:
    """Raise WeightsError unless the live tensors are, bit for bit, those of `endpoints` at λ.

    Cost: reads both once.
    """
    pieces = [(binding, span) for binding in bound for span in spans(binding.live)]
    if pieces:
        check_equal(
            parallel_map(
                lambda one: differing_name(one[0], lam, endpoints, one[1]), pieces, bound[0].live
            ),
            lam,
        )


def check_equal(names: Iterable[str | None], lam: float) -> None:
    """Raise WeightsError if one of `names`, those that differ at λ, is not None."""
    for name in names:
        if name is not None:
            raise WeightsError(
                f"endpoint check failed: at λ = {lam:g} live tensor `{name}` is not, bit for bit,"
                " what it must be there",
                "wrong pairing, tying or a dtype, or something else wrote to it; of a model that"
                " load made, please report the architecture",
            )


def _rounded(endpoint: torch.Tensor, binding: Binding) -> torch.Tensor:
    if endpoint.dtype == binding.live.dtype and binding.intermediate_dtype is None:
        return endpoint
    return endpoint.to(binding.intermediate_dtype or binding.live.dtype).to(binding.live.dtype)


# --- initial write


@dataclass(frozen=True)
class InitialWrite:
    """The initial write, on a CPU, of a store that keeps the sources as they are: each piece is
    checked and written while it is in cache.

    Attributes:
        endpoints: what the live tensors must be, by λ.
        allow_nonfinite: let NaN and infinity in the sources pass.
        on_read: called with each piece of the sources.
    """

    endpoints: CheckedEndpoints
    allow_nonfinite: bool
    on_read: OnRead | None = None

    @staticmethod
    def fits(bound: Sequence[Binding], store: Store) -> bool:
        """Return whether `store` can write these tensors piece by piece."""
        return store.keeps_sources and all(
            b.live.device.type == "cpu" for b in bound if b.live.dtype in LIVE_DTYPES
        )

    def write_(self, store: CompositeStore, floats: Sequence[Binding]) -> None:
        """Write λ = 0 into every live float tensor, after the other λ of `endpoints`.

        Cost: reads both sources once, writes the live tensors once; what is read again lies in
            cache.

        Raises:
            DataError: a source is not finite.
            WeightsError: a live tensor differs from its endpoint.
        """
        lams = [*sorted(self.endpoints.keys() - {0.0}), 0.0]

        def write(piece: tuple[int, slice]) -> None:
            t, span = piece
            binding = floats[t]
            for side, tensor in binding.sources.items():
                if not self.allow_nonfinite and not is_finite(tensor.view(-1)[span]):
                    check_finite([(side, binding.name, tensor)])
                if self.on_read is not None:
                    self.on_read(tensor, span.start, tensor.view(-1)[span])
            for lam in lams:
                store.write_(t, span, lam)
                if lam in self.endpoints:
                    check_equal([differing_name(binding, lam, self.endpoints, span)], lam)

        over_cores(write, [(t, span) for t in range(len(floats)) for span in store.spans(t)])
