"""LiveWeights: tensors somewhere in memory that follow λ in place.

It knows tensors and names. It must not know files, models or engines: those build the three dicts and call `bind`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import pa_kernels
from pa_kernels.cores import over_cores
from pa_kernels.reference import LIVE_DTYPES

from pa_fast.base import Lambda
from pa_fast.checkpoint.fingerprint import combine
from pa_fast.delta.entry import Entry, parts
from pa_fast.delta.file import DeltaFile
from pa_fast.delta.mixed import Mixed
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live import opening
from pa_fast.live.binding import Binding, bindings, same_bits
from pa_fast.live.encoding import check_finite, sources
from pa_fast.live.memory import Memory, measure
from pa_fast.live.planner import Store, planned

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class LiveWeights:
    """T live tensors that hold W(λ) for the λ set last, bit for bit, whatever came before.

    Make one with `LiveWeights.bind` or `LiveWeights.open`. A context manager: leaving it closes it.

    Attributes:
        lam: the λ that the live tensors hold, or None after a switch that did not finish.
        store: how the delta is held, with all options.
        exact: whether W(λ) is, bit for bit, the contract between base and the delta's own end.
        lossless: whether that end is the instruct model.
        before_reading: called before the sources may be read, if whoever made these weights sets it: it raises where they
            are not what they were.
    """

    def __init__(
        self,
        live: Mapping[str, torch.Tensor],
        made: Sequence[Binding],
        entries: Iterable[Entry],
        store: str,
        exact: bool,
        lossless: bool,
    ):
        floats = [binding for binding in made if binding.live.dtype in LIVE_DTYPES]
        with _writing(floats):
            self._store: Mixed | None = Mixed(
                [b.live for b in floats], [b.base for b in floats], list(entries), [b.via for b in floats]
            )
        self._floats = [replace(binding, sources={}) for binding in floats]  # the store keeps what it needs of them
        self._fixed = [binding for binding in made if binding.live.dtype not in LIVE_DTYPES]
        self._bindings = [*self._floats, *self._fixed]
        self._watched = [(name, tensor, tensor.data_ptr()) for name, tensor in live.items()]
        self._sums: dict[float, int] = {}
        self._foreign = True  # nothing of what no λ changes has been written yet
        self.lam: float | None = None
        self.before_reading: Callable[[], None] | None = None
        self.store, self.exact, self.lossless = store, exact, lossless
        self.set_lambda(0.0)

    @classmethod
    def bind(
        cls,
        live: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        instruct: Mapping[str, torch.Tensor],
        store: str | Store = "dense",
        rounding: str = "nearest",
        *,
        via: Mapping[str, torch.dtype] | None = None,
        allow_nonfinite: bool = False,
    ) -> LiveWeights:
        """Make `live` follow λ between `base` and `instruct`; returns with λ = 0 written.

        Args:
            live: name → contiguous tensor, written in place and never moved. Any shape; bf16, fp16 or fp32 tensors are
                interpolated, tensors of other dtypes must be equal on both sides and are written once. Tensors that
                share identical storage (a tied head) are written once.
            base, instruct: the same names and shapes. Read only; bf16, fp16, fp32 in any mix, on any device. The base is
                kept until `close`; of instruct only what the store says.
            store: how the delta is held: `dense` (or `auto`): both sides, as they are, on the live tensors' device;
                `sparse`: what differs, and the base wherever it is; `lowrank`: factors, an approximation. For options
                pass a `SparseStore` or a `LowRankStore`.
            rounding: `nearest`, ties to even.
            via: for names whose live tensor is wider than the dtype that a saved merge would have, that dtype.
            allow_nonfinite: let NaN and infinity in the sources pass.

        Numerics: see `pa_kernels.reference.lerp` for the contract, and the store for the end of its delta.
        Cost: reads every source once to check it and as often as the store says, tensor by tensor; then one switch.

        Raises:
            PairError, WeightsError: the dicts do not fit each other, or memory overlaps.
            DataError: non-finite sources, or unequal tensors of a dtype that is not interpolated.
            UsageError: unknown store or rounding.
        """
        chosen = planned(store)
        if rounding != "nearest":
            raise UsageError(f"rounding `{rounding}` is not available", "available: nearest")
        if getattr(chosen, "attached", False):
            raise UsageError(
                "factors attach to layers, and here are tensors alone", "use pa_fast.load, or merge them: attached=False"
            )
        made = bindings(live, {"base": base, "instruct": instruct}, via or {})
        entries = chosen.encode(sources(made, allow_nonfinite))
        return cls(live, made, entries, chosen.describe(), chosen.exact, chosen.lossless)

    @classmethod
    def open(
        cls,
        live: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        delta: str | Path | DeltaFile,
        *,
        allow_nonfinite: bool = False,
        divert: Callable[[str, torch.Tensor, Entry], Entry] | None = None,
    ) -> LiveWeights:
        """Make `live` follow λ between `base` and the end of a delta file; returns with λ = 0 written.

        Args:
            live, base: as for `bind`; float tensors of the names, shapes and dtypes that the file was encoded for.
            delta: the file, or one that is open.
            allow_nonfinite: let NaN and infinity in base and delta pass.
            divert: (name, base, entry) → the entry to follow instead, for engines that use an entry themselves.

        Cost: reads the base three times and the file twice. What the file holds stays a map of it on a CPU.

        Raises:
            CheckpointError: the file is no delta, is damaged, or does not give what it was encoded to give.
            PairError: the delta belongs to another base, or to live tensors of another kind.
            WeightsError, DataError: as for `bind`.
        """
        if not isinstance(delta, DeltaFile):
            with DeltaFile.open(delta) as file:
                return cls.open(live, base, file, allow_nonfinite=allow_nonfinite, divert=divert)
        made = [opening.fed(binding, delta) for binding in bindings(live, {"base": base}, {})]
        opening.check_names(made, delta)
        floats = [binding for binding in made if binding.live.dtype in LIVE_DTYPES]
        opening.check_base(floats, delta)
        entries = [delta.entry(opening.own_name(binding, delta), binding.live.device) for binding in floats]
        if not allow_nonfinite:
            for binding, entry in zip(floats, entries):
                check_finite("base", binding.name, binding.base)
                for part, tensor in parts(entry).items():
                    if tensor.dtype in LIVE_DTYPES:
                        check_finite(f"{delta.path}: {part} of", binding.name, tensor)
        about = delta.about
        if divert is not None:
            entries = [divert(binding.name, binding.base, entry) for binding, entry in zip(floats, entries)]
        weights = cls(live, made, entries, about.options, about.exact, about.lossless)
        for lam in (1.0, 0.0):
            weights.set_lambda(lam)
            opening.check_end(floats, delta, lam)
        return weights

    def set_lambda(self, lam: float) -> None:
        """Write W(λ) into every live tensor, in place; on a GPU queued on the current stream.

        Cost: one pass over what the store holds, 6 bytes per bf16 parameter for `dense`; nothing is allocated on a GPU.
            After something else was seen to have written to the weights, one more pass that writes all of them.

        Raises:
            UsageError: λ is not a finite number.
            WeightsError: closed, or a live tensor no longer lies where it was bound.
        """
        import torch

        value = float(Lambda(lam))
        store = self._open()
        self._check_pointers()
        self.lam = None  # until the last byte is written, this is no λ at all
        with _writing(self._floats):
            if self._foreign:
                store.restore_()
            store.set_(value)
            for binding in self._fixed:
                binding.live.copy_(binding.base)
        torch.autograd.graph.increment_version([b.live for b in self._bindings if not b.live.is_inference()])
        self.lam = value
        if self._foreign:
            self._foreign = False
            self._sums.clear()

    def checksum(self) -> int:
        """The proof of switch: S = Σ_t odd(name_t) · Σ_j word_j · odd(j) mod 2⁶⁴ over the live tensors.

        word_j are a tensor's bytes as little-endian 64-bit words, zero-padded. Comparable within one layout only.
        Cost: one read of the live copy; waits for the device.

        Raises:
            WeightsError: closed, or a live tensor no longer lies where it was bound.
        """
        self._open()
        self._check_pointers()
        sums = pa_kernels.checksum([binding.live for binding in self._bindings])
        total = combine({binding.name: part for binding, part in zip(self._bindings, sums)})
        # a λ has one sum: where it has another one, the next switch trusts nothing that it finds
        if self.lam is not None and self._sums.setdefault(self.lam, total) != total:
            self._foreign = True
        return total

    def verify(self) -> bool:
        """Merge once more from the sources, aside, and compare every bit with the live tensors.

        Returns True, so that `assert weights.verify()` reads well.
        Cost: reads live and sources once; scratch of a few MB.

        Raises:
            WeightsError: a tensor differs (named), or no λ is set.
        """
        wrong = self.changed()
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise WeightsError(
                f"live tensor `{wrong[0]}`{more} does not hold the merge at λ = {self.lam}",
                "something else wrote to the weights; the next set_lambda writes all of them again",
            )
        return True

    def changed(self) -> list[str]:
        """Names of live tensors whose bits are not those of a fresh merge at the current λ.

        Raises:
            WeightsError: closed, or no λ is set because a switch failed.
        """
        store = self._open()
        self._check_pointers()
        if self.lam is None:
            raise WeightsError("no λ is set: the last switch did not finish", "call set_lambda")
        lam = self.lam

        def holds(t: int, span: slice) -> bool:
            return same_bits(store.merged(t, span, lam), self._floats[t].live.view(-1)[span])

        differing = {t for t, held in self._over_spans(holds) if not held}
        wrong = [binding.name for t, binding in enumerate(self._floats) if t in differing]
        wrong += [binding.name for binding in self._fixed if not same_bits(binding.live, binding.base.to(binding.live.device))]
        self._foreign |= bool(wrong)
        return wrong

    def effective_lambda(self) -> float:
        """Where on the line the rounded weights really are: ⟨W − B, D − B⟩ / ‖D − B‖², over all interpolated weights.

        D is the delta's own end, which is instruct where the store is lossless.

        The grid of a 16-bit dtype swallows updates smaller than half a unit in the last place, so this can differ
        from λ by a factor at small λ. NaN where base and instruct are equal.
        Cost: reads live and sources once; fp32 dot products of pieces, summed in order in fp64.
        """
        moved, distance = self.projection()
        return moved / distance if distance else float("nan")

    def projection(self, names: Container[str] | None = None) -> tuple[float, float]:
        """⟨W − B, D − B⟩ and ‖D − B‖² over the interpolated weights called `names`, of all where None."""
        store = self._open()

        def products(t: int, span: slice) -> tuple[float, float]:
            return store.products(t, span) if names is None or self._floats[t].name in names else (0.0, 0.0)

        moved = distance = 0.0
        for _, (part, whole) in self._over_spans(products):
            moved, distance = moved + part, distance + whole
        return moved, distance

    def memory(self) -> Memory:
        """Bytes of the live copy and of what lies beside it: `live_bytes`, `device_bytes`, `host_bytes`,
        `mapped_bytes` (page cache of mapped files), `total_bytes` (the first three)."""
        beside = [*self._open().beside(), *(tensor for binding in self._fixed for tensor in binding.sources.values())]
        return measure((binding.live for binding in self._bindings), beside)

    def __repr__(self) -> str:
        if self._store is None:
            return "<LiveWeights, closed>"
        count = sum(binding.live.numel() for binding in self._bindings)
        return f"<LiveWeights at λ = {self.lam}: {len(self._bindings)} tensors, {count:,} weights, {self.store}>"

    def close(self) -> None:
        """Let go of the sources. The live tensors keep the λ they have; nothing else can be asked any more."""
        self._store = None
        self.before_reading = None
        self._bindings, self._floats, self._fixed, self._watched = [], [], [], []

    def __enter__(self) -> LiveWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _over_spans(self, work: Callable[[int, slice], T]) -> Iterator[tuple[int, T]]:
        """(t, work(t, span)) for every span of every interpolated tensor, in order; on a CPU one core per span."""
        store = self._open()
        spans = [(t, span) for t in range(len(self._floats)) for span in store.spans(t)]
        on_cpu = all(binding.live.device.type == "cpu" for binding in self._floats)
        run = over_cores if on_cpu else map
        return zip((t for t, _ in spans), run(lambda at: work(*at), spans))

    def _open(self) -> Mixed:
        if self._store is None:
            raise WeightsError("these live weights are closed", "bind them again")
        if self.before_reading is not None:
            self.before_reading()
        return self._store

    def _check_pointers(self) -> None:
        for name, tensor, pointer in self._watched:
            if tensor.data_ptr() != pointer:
                raise WeightsError(
                    f"live tensor `{name}` has moved: bound at {pointer:#x}, now at {tensor.data_ptr():#x}",
                    "bind after everything that moves or replaces parameters (`to`, `half`, `tie_weights`, loading)",
                )


def _writing(made: Iterable[Binding]) -> torch.inference_mode | torch.no_grad:
    """The mode in which the live tensors may be written: inference tensors only in inference mode."""
    import torch

    return torch.inference_mode() if any(b.live.is_inference() for b in made) else torch.no_grad()
