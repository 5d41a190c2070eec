"""The entries of a delta behind live weights, each with the store that it belongs to, switched
together."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from pa_kernels.projection import projection
from pa_kernels.reference import Draw
from pa_kernels.switch import Written
from torch import Tensor

from pa_fast.stores import registry
from pa_fast.stores.store import Entry, Overwritten, Store, span_elements


class CompositeStore:
    """T live float tensors with their bases and entries, each bound to its own store. Methods are
    those of `Store`, with tensors numbered over all stores.

    Args:
        live, base, entries, intermediate_dtypes, draws: as for `Store.bind`.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        base: Sequence[Any],
        entries: Sequence[Entry],
        intermediate_dtypes: Sequence[torch.dtype | None],
        draws: Sequence[Draw | None] | None = None,
    ):
        self._live = list(live)
        owned: dict[type[Store], list[int]] = {}
        for t, entry in enumerate(entries):
            owned.setdefault(registry.owner(entry), []).append(t)
        self._parts: list[tuple[Store, list[int]]] = []
        self._located: dict[int, tuple[Store, int]] = {}
        for kind, members in owned.items():
            store = kind()
            columns: list[Sequence[Any]] = [live, base, entries, intermediate_dtypes]
            columns += [] if draws is None else [draws]
            store.bind(*([column[t] for t in members] for column in columns))
            self._parts.append((store, members))
            self._located.update((t, (store, k)) for k, t in enumerate(members))

    def check(self, lam: float | Sequence[float]) -> None:
        """Raise UsageError, before anything is written, if λ is outside the range of a store."""
        for store, members in self._parts:
            store.check(_own(lam, members))

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ), of one λ for all or of one for each, to the elements that depend on λ.

        Raises:
            Overwritten: something else wrote to tensors whose switch starts from what they hold;
                all stores have been tried.
        """
        wrong: list[int] = []
        for store, members in self._parts:
            try:
                store.set_(_own(lam, members))
            except Overwritten as overwritten:
                wrong += [members[k] for k in overwritten.entries]
        if wrong:
            raise Overwritten(wrong)

    def written(self) -> list[Written | None]:
        """Return what the last `set_` wrote to each tensor; see `Store.written`."""
        written: dict[int, Written | None] = {}
        for store, members in self._parts:
            written.update(zip(members, store.written()))
        return [written[t] for t in range(len(self._live))]

    def overwritten(self) -> list[int]:
        """Return tensors whose switch did not start from what the last one left; see
        `Store.overwritten`."""
        return [members[k] for store, members in self._parts for k in store.overwritten()]

    def restore_(self, base_of: Callable[[int], Tensor | None] = lambda t: None) -> None:
        for store, members in self._parts:
            store.restore_(lambda k, members=members: base_of(members[k]))  # type: ignore[misc]

    def rewrite_(self, written: Container[int]) -> None:
        """Write the elements that `set_` does not write of the tensors `written`, to which
        something else has written.

        Packed tensors detect by their sums whether other bits were written; `set_` then refuses
        them.
        """
        for store, members in self._parts:
            store.rewrite_({k for k, t in enumerate(members) if t in written})

    def known_sum(self, t: int) -> int | None:
        store, k = self._located[t]
        return store.known_sum(k)

    def spans(self, t: int) -> Iterator[slice]:
        store, k = self._located[t]
        return store.spans(k)

    def merged(self, t: int, span: slice, lam: float) -> Tensor:
        store, k = self._located[t]
        return store.merged(k, span, lam)

    def batches(self, entries: Container[int]) -> Iterator[list[tuple[int, slice]]]:
        """Yield the spans of `entries` in lists, each of one store, device and dtype: single large
        spans, or as many small ones as are worth a call together."""
        for store, members in self._parts:
            kinds: dict[Any, list[tuple[int, int]]] = {}
            for k, t in enumerate(members):
                if t in entries:
                    live = self._live[t]
                    kinds.setdefault((live.device, live.dtype), []).append((k, t))
            for (device, _), tensors in kinds.items():
                batch: list[tuple[int, slice]] = []
                remaining = most = span_elements(device)
                for k, t in tensors:
                    for span in store.spans(k):
                        if batch and span.stop - span.start > remaining:
                            yield batch
                            batch, remaining = [], most
                        batch.append((t, span))
                        remaining -= span.stop - span.start
                if batch:
                    yield batch

    def merged_together(
        self, batch: Sequence[tuple[int, slice]], lams: Sequence[float]
    ) -> list[Tensor]:
        """Merge one of `batches` anew; see `Store.merged_together`."""
        store, _ = self._located[batch[0][0]]
        return store.merged_together([(self._located[t][1], span) for t, span in batch], lams)

    def write_(self, t: int, span: slice, lam: float) -> None:
        store, k = self._located[t]
        store.write_(k, span, lam)

    def endpoints(self, t: int, span: slice) -> tuple[Tensor, Tensor]:
        store, k = self._located[t]
        return store.endpoints(k, span)

    def products(self, t: int, span: slice) -> tuple[float, float]:
        """Return ⟨W − B, D − B⟩ and ‖D − B‖² over the elements `span` of tensor t, where D is the
        delta's own endpoint W(1); fp32."""
        return _products(self._live[t].view(-1)[span], *self.endpoints(t, span))

    def beside(self) -> list[Tensor]:
        """Return every tensor that is kept beside the live copy."""
        return [tensor for store, _ in self._parts for tensor in store.beside()]


def _products(live: Tensor, base: Tensor, end: Tensor) -> tuple[float, float]:
    """Return those products of flat tensors [N] of any float dtypes."""
    if live.device.type == "cpu":
        return projection(live, base, end), projection(end, base, end)
    w, b, d = (side.to(live.device, torch.float32, copy=True) for side in (live, base, end))
    w.sub_(b)
    d.sub_(b)
    return float(torch.dot(w, d)), float(torch.dot(d, d))


def _own(lam: float | Sequence[float], members: Sequence[int]) -> float | list[float]:
    """Return those of one λ per tensor that are for `members`; one number if they are equal."""
    own = [lam[t] for t in members] if isinstance(lam, Sequence) else [lam]
    return own[0] if len(set(own)) == 1 else own
