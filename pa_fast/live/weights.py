"""LiveWeights: tensors in memory that follow λ in place.

This module knows tensors and names. It must not know files, models or engines: those build the
three dicts and call `bind`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pa_kernels
from pa_kernels.cores import inference, over_cores, settle
from pa_kernels.reference import LIVE_DTYPES, Draw
from pa_kernels.switch import Written

from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import combine
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live import opening
from pa_fast.live.binding import (
    Binding,
    bindings,
    check_named,
    equal_bits,
    kept_bases,
    same_merge,
)
from pa_fast.live.checkpoint_names import CheckpointNames
from pa_fast.live.encoding import check_finite
from pa_fast.live.endpoints import CheckedEndpoints, Endpoints, InitialWrite, check_live
from pa_fast.live.memory import Memory, measure
from pa_fast.live.placement import free_memory, placed, sizes
from pa_fast.live.planner import Plan, plan
from pa_fast.live.sources import Sources
from pa_fast.live.streams import StreamOrder
from pa_fast.rounding import NEAREST, Rounding
from pa_fast.rules import LambdaRule
from pa_fast.stores import registry
from pa_fast.stores.composite import CompositeStore
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.sparse import unchanged
from pa_fast.stores.store import Entry, Overwritten, Store

if TYPE_CHECKING:
    import torch

_REPLACED = (
    "load or bind again, after everything that moves or replaces parameters: `.half()`, `.to()`,"
    " `tie_weights`, loading"
)

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")


def _one_thread(
    method: Callable[Concatenate[LiveWeights, P], T],
) -> Callable[Concatenate[LiveWeights, P], T]:
    """Wrap `method` so that one thread at a time runs it, after work that an interrupt left running
    has ended; others wait.

    Raises:
        WeightsError: this thread is in such a method already: a signal handler or a callback called
            it.
    """

    @functools.wraps(method)
    def alone(self: LiveWeights, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._lock._is_owned():
            here = sys._getframe()
            frame = here.f_back
            while frame is not None and not (
                frame.f_code is here.f_code and frame.f_locals["self"] is self
            ):
                frame = frame.f_back
            if frame is not None:
                raise WeightsError(
                    f"{method.__name__} was called while the same thread was in another call of"
                    " these live weights",
                    "do not use live weights in a signal handler or a callback: set a flag there,"
                    " and act on it afterwards",
                )
            # Python 3.10 can leave a `with` by a second interrupt without releasing what it holds
            self._lock.release()
        with self._lock:
            settle()
            return method(self, *args, **kwargs)

    return alone


class LiveWeights:
    """T live tensors that hold W(λ) of the λ set last, bit for bit, whatever came before.

    Make one with `LiveWeights.bind` or `LiveWeights.open`. It is a context manager that closes the
    weights.

    Threads: methods that read or write the live tensors run in one thread at a time; others wait.
    A model that computes in one thread while another sets λ still computes with a mix: its owner
    has to prevent that.

    Example:
        with pa_fast.LiveWeights.bind(live, base, instruct) as weights:
            weights.set_lambda(0.6)
            assert weights.verify()

    Attributes:
        lam: the λ that the live tensors hold, of a rule its swept one; None after a switch that did
            not finish.
        rule: the rule that gives each tensor its λ from that, or None where all have the same.
        followed: the rule that spreads a plain λ, see `follow`, or None.
        rounding: how a merge is rounded: `nearest`, or `stochastic` with its seed.
        store: how the delta is held, with all options.
        exact: whether W(λ) is, bit for bit, the contract between base and the delta's endpoint.
        lossless: whether that endpoint is the instruct model.
        plan: why the delta is held as it is, or None where it came from a file.
        apart: name → U, V, of tensors that stay at base for an engine that uses the factors itself.
        sources: what the live tensors lie between; None once closed.
    """

    def __init__(
        self,
        live: Mapping[str, torch.Tensor],
        bound: Sequence[Binding],
        entries: Iterable[Entry],
        store: str,
        exact: bool,
        lossless: bool,
        sources: Sources,
        rounding: Rounding = NEAREST,
        initial_write: InitialWrite | None = None,
        apart: Container[str] = (),
    ):
        floats = [binding for binding in bound if binding.live.dtype in LIVE_DTYPES]
        self._names = CheckpointNames([b.names for b in floats], sources.checkpoint_names)
        self.rounding = rounding
        self.sources: Sources | None = sources
        self._given: Mapping[str, torch.Tensor] | None = None
        self.plan: Plan | None = None
        self.apart: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        draws = (
            [Draw(key) for key in self._names.keys(self.rounding)]
            if self.rounding.is_stochastic
            else None
        )
        with _writing(floats):
            held = [self._put_apart(b, entry, apart) for b, entry in zip(floats, entries)]
            bases = kept_bases(floats, held)
            self._store: CompositeStore | None = CompositeStore(
                [b.live for b in floats], bases, held, [b.intermediate_dtype for b in floats], draws
            )
        # the store keeps what it needs of them
        self._floats = [replace(binding, sources={}) for binding in floats]
        self._fixed = [binding for binding in bound if binding.live.dtype not in LIVE_DTYPES]
        self._bindings = [*self._floats, *self._fixed]
        self._watched = [
            (name, tensor, tensor.data_ptr(), _form(tensor)) for name, tensor in live.items()
        ]
        self._memory: pa_kernels.Checksum | None = pa_kernels.Checksum(
            [binding.live for binding in self._bindings]
        )
        self._order = StreamOrder(binding.live.device for binding in self._bindings)
        self._is_recorded = False
        self._recorded: list[Written | None] | None = None
        self._sums: dict[tuple[float, ...], int] = {}
        self._foreign = True  # elements that no λ changes have not been written yet
        self._lams: tuple[float, ...] = ()
        self._lock: Any = threading.RLock()
        self._versions: list[int] = []
        self.followed: LambdaRule | None = None
        self.lam: float | None = None
        self.rule: LambdaRule | None = None
        self.store, self.exact, self.lossless = store, exact, lossless
        if initial_write is None:
            self._switch(0.0)
        else:
            with _writing(self._floats):
                initial_write.write_(self._store, floats)
                self._write_fixed()
            self._written(0.0, None, (0.0,) * len(floats))
            for lam in initial_write.endpoints:
                check_live(self._fixed, lam, initial_write.endpoints)

    def _put_apart(self, binding: Binding, entry: Entry, names: Container[str]) -> Entry:
        """Return `entry`, or one without a delta where the factors are kept apart."""
        factors = registry.owner(entry).factors(entry) if binding.name in names else None
        if factors is None:
            return entry
        self.apart[binding.name] = factors
        return unchanged(binding.base)

    @classmethod
    def bind(
        cls,
        live: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        instruct: Mapping[str, torch.Tensor],
        store: str | Store = "dense",
        rounding: str | Rounding = "nearest",
        *,
        residency: str = "device",
        seed: int | None = None,
        intermediate_dtype: Mapping[str, torch.dtype] | None = None,
        allow_nonfinite: bool = False,
        checkpoint_names: Mapping[str, Sequence[str]] | None = None,
        endpoints: Endpoints | None = None,
    ) -> LiveWeights:
        """Make `live` follow λ between `base` and `instruct`; returns with λ = 0 written.

        Args:
            live: name → contiguous tensor, written in place and never moved. Any shape; bf16, fp16
                or fp32 tensors are interpolated, tensors of other dtypes must be equal on both
                sides and are written once. Tensors that share identical storage (a tied head) are
                written once.
            base, instruct: the same names and shapes. Read only; bf16, fp16, fp32 in any mix, on
                any device. The base is kept until `close`; of instruct only what the store says.
                They must not change as long as the weights are bound, which nothing checks: what is
                kept is kept as it is, not copied, so later λ would lie between changed sources, and
                `verify`, which merges from the same tensors, would not see it. Pass clones of the
                tensors of a model that is trained on.
            store: how the delta is held: `dense` (or `auto`): both sides, as they are, on the live
                tensors' device; `packed`: codes alone, bit for bit as dense, for λ from 0 to 1;
                `sparse`: what differs, and the base wherever it is; `lowrank`: factors, an
                approximation. For options pass a `PackedStore`, `SparseStore` or `LowRankStore`.
            residency: where what is kept beside live tensors on a GPU lies: `device`; `host`, in
                pinned memory that the GPU reads at every switch; `auto`, as much of it on the
                device as fits. On a CPU it is where it is.
            rounding: `nearest`, ties to even; or `stochastic`, of the dense store alone: each
                element has noise of its own by tensor name, place and seed, so that the weights
                follow λ on average where nearest swallows small updates.
            seed: of stochastic rounding, 0 to 2³² − 1; 0 unless given.
            intermediate_dtype: for names whose live tensor is wider than the dtype that a saved
                merge would have, that dtype.
            allow_nonfinite: let NaN and infinity in the sources pass.
            checkpoint_names: live name → names of the checkpoint's tensors whose elements it holds:
                the names that λ rules and noise use. By default its own name, which is right where
                live tensors are those of a checkpoint.
            endpoints: what the live tensors must be at these λ; see `check_endpoints`. With it, a
                source that is refused may leave `live` written in part.

        Example:
            live = dict(model.named_parameters())
            weights = pa_fast.LiveWeights.bind(live, base, instruct)
            weights.set_lambda(0.6)

        Numerics: see `pa_kernels.reference.lerp` for the contract, and the store for the endpoint
            of its delta.
        Cost: reads every source once to check it and as often as the store says, tensor by tensor;
            then one switch. Dense on a CPU and with `endpoints` all of that is one pass: each piece
            of the sources is read once.

        Raises:
            PairError, WeightsError: the dicts do not fit each other, or memory overlaps; a live
                tensor differs from its endpoint.
            DataError: non-finite sources, or unequal tensors of a dtype that is not interpolated.
            UsageError: unknown store or rounding, or stochastic rounding of another store than
                dense.
        """
        return cls.between(
            live,
            Sources(base, instruct, intermediate_dtype, checkpoint_names),
            store,
            Rounding.of(rounding, seed),
            residency=residency,
            allow_nonfinite=allow_nonfinite,
            endpoints=endpoints,
        )

    @classmethod
    def between(
        cls,
        live: Mapping[str, torch.Tensor],
        sources: Sources,
        store: str | Store | Plan,
        rounding: Rounding = NEAREST,
        *,
        residency: str = "device",
        allow_nonfinite: bool = False,
        endpoints: Endpoints | None = None,
        apart: Container[str] = (),
    ) -> LiveWeights:
        """Make `live` follow λ between the sides of `sources`; see `bind`.

        Args:
            store: a store or a plan; a plan has the residency too.
            apart: tensors that stay at base at every λ, if their delta is a product. Its factors
                are then in the attribute `apart`, for an engine that uses them itself.
        """
        requested = store.store if isinstance(store, Plan) else registry.named(store)
        _check_store(requested, rounding)
        sides = {
            "base": sources.base,
            "instruct": {} if sources.instruct is None else sources.instruct,
        }
        bound = bindings(live, sides, sources.intermediate_dtype)
        planned = (
            store
            if isinstance(store, Plan)
            else plan(sizes(bound), store, residency, free_memory(bound))
        )
        chosen = planned.store
        _check_store(chosen, rounding)
        checked = None if endpoints is None else CheckedEndpoints.of(endpoints, bound)
        initial_write = (
            InitialWrite(checked, allow_nonfinite, sources.note_read)
            if checked is not None and InitialWrite.fits(bound, chosen)
            else None
        )
        unchecked = allow_nonfinite or initial_write is not None
        bound, entries = placed(bound, chosen, planned.host, unchecked, sources.note_read)
        flags = chosen.describe(), chosen.exact, chosen.lossless
        weights = cls(live, bound, entries, *flags, sources, rounding, initial_write, apart)
        weights.plan = planned
        if checked is not None and initial_write is None:
            weights.check_endpoints(checked)
        sources.release()
        return weights

    @classmethod
    def open(
        cls,
        live: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        delta: str | Path,
        *,
        allow_nonfinite: bool = False,
        checkpoint_names: Mapping[str, Sequence[str]] | None = None,
    ) -> LiveWeights:
        """Make `live` follow λ between `base` and the endpoint of a delta file; returns with λ = 0
        written.

        Args:
            live, base: as for `bind`; float tensors of the names, shapes and dtypes that the file
                was encoded for.
            delta: the file.
            allow_nonfinite: let NaN and infinity in base and delta pass.
            checkpoint_names: as for `bind`.

        Example:
            live = dict(model.named_parameters())
            weights = pa_fast.LiveWeights.open(live, base, "delta")

        Cost: reads the base three times and the file twice, of packed tensors once more each. On a
            CPU what the file holds stays a memory map of it.

        Raises:
            UsageError: `delta` is no path.
            CheckpointError: the file is no delta, is damaged, or does not give the endpoints that
                it was encoded for.
            PairError: the delta belongs to another base, or to live tensors of another kind.
            WeightsError, DataError: as for `bind`.
        """
        with DeltaFile.open(delta) as file:
            sources = Sources(base, checkpoint_names=checkpoint_names)
            return cls.after(live, sources, file, allow_nonfinite=allow_nonfinite)

    @classmethod
    def after(
        cls,
        live: Mapping[str, torch.Tensor],
        sources: Sources,
        delta: DeltaFile,
        *,
        allow_nonfinite: bool = False,
        apart: Container[str] = (),
    ) -> LiveWeights:
        """Make `live` follow λ between the base of `sources` and the endpoint of an open delta
        file; see `open`, and `between` for `apart`."""
        bound = bindings(live, {"base": sources.base}, {})
        bound = [opening.described(binding, delta) for binding in bound]
        opening.check_delta_names(bound, delta)
        floats = [binding for binding in bound if binding.live.dtype in LIVE_DTYPES]
        opening.check_base(floats, delta)
        entries = [
            delta.entry(opening.own_name(binding, delta), binding.live.device) for binding in floats
        ]
        if not allow_nonfinite:
            check_finite(
                (
                    read
                    for binding, entry in zip(floats, entries)
                    for read in (
                        ("base", binding.name, binding.base),
                        *(
                            (f"{delta.path}: {part} of", binding.name, tensor)
                            for part, tensor in registry.owner(entry).parts(entry).items()
                        ),
                    )
                    if read[2].dtype in LIVE_DTYPES
                ),
                sources.note_read,
            )
        opening.check_entries(floats, entries, delta)
        description = delta.description
        flags = description.options, description.exact, description.lossless
        weights = cls(live, bound, entries, *flags, sources, apart=apart)
        for lam in (1.0, 0.0):
            weights.set_lambda(lam)
            opening.check_endpoint(floats, delta, lam)
        sources.release()
        return weights

    def touched(self, rule: LambdaRule) -> list[str]:
        """Return one line for each row of `rule`: the tensors whose λ it sets.

        Raises:
            UsageError: the rule does not fit the tensors' names.
        """
        return self._names.touched(rule)

    @_one_thread
    def follow(self, rule: LambdaRule | None) -> None:
        """Spread every plain λ by `rule` from now on: `set_lambda(0.6)` is then
        `set_lambda(rule.at(0.6))`. None: one λ for all tensors again. Sets the current λ once more,
        by the rule.

        Raises:
            UsageError, WeightsError: as for `set_lambda`; what was followed before still is.
        """
        lam = 0.0 if self.lam is None else self.lam
        before, self.followed = self.followed, None
        try:
            self._switch(lam if rule is None else rule.at(lam))
        except BaseException:
            self.followed = before
            raise
        self.followed = rule

    @_one_thread
    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Write W(λ) into every live tensor, in place; on a GPU queued on the current stream, after
        what the default stream has queued, and before what it queues later.

        Args:
            lam: one λ for all tensors, or of the rule that is followed; or a rule at its λ, which
                gives each tensor its own by its name in the checkpoint.

        Example:
            for lam in pa_fast.lambdas("0:1:0.1"):
                weights.set_lambda(lam)

        Cost: one pass over what the store holds, 6 bytes per bf16 parameter for `dense`; nothing is
            allocated on a GPU. After something else was seen to have written to the weights, one
            more pass that writes all of them.

        Raises:
            UsageError: λ is not a finite number, or outside the range of a packed delta; or the
                rule does not fit the tensors' names.
            WeightsError: closed, or a live tensor no longer lies where it was bound; or called by a
                signal handler or callback while the same thread is in such a call; or packed
                weights were overwritten, which on a GPU the next checksum or verification says.
        """
        self._switch(lam)

    def _switch(self, lam: float | LambdaRule) -> None:
        import torch

        store = self._open()
        value, rule, lams = self._resolved(lam)
        self._check_pointers()
        written = {
            t for t, (now, then) in enumerate(zip(self._counted(), self._versions)) if now != then
        }
        # until the last byte is written, the tensors hold no λ, and none of their bytes is trusted
        foreign, self._foreign, self.lam = self._foreign, True, None
        self._is_recorded, self._recorded = False, None
        recording = torch.is_grad_enabled()
        try:
            with _writing(self._floats), self._order.ordered():
                if foreign:
                    store.restore_(self._base_of)
                elif written:
                    store.rewrite_(written)
                try:
                    store.set_(lams)
                except Overwritten as error:
                    raise _overwritten([self._floats[t].name for t in error.entries]) from None
                self._is_recorded = True
                self._write_fixed()
        finally:
            # an interrupt may have left `no_grad` before it put this back
            torch._C._set_grad_enabled(recording)
        self._written(value, rule, lams)
        if foreign:
            self._sums.clear()

    def check_lambda(self, lam: float | LambdaRule) -> None:
        """Raise the UsageError that `set_lambda` would for this λ, and write nothing. Sweeps call
        it before the first point."""
        self._resolved(lam)

    def _resolved(
        self, lam: float | LambdaRule
    ) -> tuple[float, LambdaRule | None, tuple[float, ...]]:
        """Return the swept λ, the rule if there is one, and the λ of each live tensor, checked to
        be within the range of the store."""
        store = self._open()
        rule = lam if isinstance(lam, LambdaRule) else self.followed and self.followed.at(lam)
        value = float(Lambda(lam) if rule is None else rule.lam)
        lams = (value,) * len(self._floats) if rule is None else self._names.lams(rule)
        try:
            store.check(lams)
        except UsageError as error:
            if rule is None:
                raise
            raise UsageError(
                f"at λ = {rule.lam.key} of the rule, {error.message}", error.hint
            ) from None
        return value, rule, lams

    @_one_thread
    def resync(self, base: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write every byte anew, whatever the live tensors hold. A packed store needs it after a
        foreign write.

        Args:
            base: the base tensors by name, for packed weights whose base is neither a memory map of
                a file nor still held by the caller. They are checked to be those that were bound.

        The λ afterwards is the one that was set, by the same rule; 0 if a switch did not finish.
        Cost: one copy, and one switch.

        Raises:
            WeightsError: closed, no base is at hand, or it is another one.
        """
        self._open()
        if base is not None:
            check_named("base", base)
        self._check_pointers()
        lam = 0.0 if self.lam is None else self.lam if self.rule is None else self.rule
        self._given, self._foreign = base, True
        try:
            self._switch(lam)
        finally:
            self._given = None

    @_one_thread
    def check_endpoints(self, endpoints: Endpoints) -> None:
        """Compare every live tensor, at each λ of `endpoints`, with what it must be there, bit for
        bit; leaves λ = 0.

        Args:
            endpoints: λ → live name → tensor of the live shape, of its dtype or another of bf16,
                fp16 and fp32, rounded as a merge would be. Each name of a live tensor is compared
                with its own. None may lie in live memory.

        Example:
            weights.check_endpoints({0.0: base, 1.0: instruct})

        Cost: a switch for each λ that is not set, and one read of the live tensors and of
            `endpoints`.

        Raises:
            WeightsError: a tensor differs (named), which leaves that λ set; or an endpoint cannot
                be compared.
            UsageError: not λ → name → tensor; or a rule is followed, by which λ = 1 is not the
                endpoint of every tensor.
        """
        self._open()
        if self.followed is not None:
            raise UsageError(
                "endpoints cannot be checked while a rule is followed",
                "check them before `follow`, or follow(None)",
            )
        every = [*self._floats, *self._fixed]
        by_lambda = CheckedEndpoints.of(endpoints, every)
        for lam in sorted(by_lambda, reverse=True):
            if self.lam != lam or self.rule is not None:
                self._switch(lam)
            check_live(every, lam, by_lambda)
        if self.lam != 0.0 or self.rule is not None:
            self._switch(0.0)

    def _write_fixed(self) -> None:
        for binding in self._fixed:
            binding.live.copy_(binding.base)

    def _written(self, lam: float, rule: LambdaRule | None, lams: tuple[float, ...]) -> None:
        """Record that every byte is that of λ now."""
        import torch

        torch.autograd.graph.increment_version(
            [b.live for b in self._bindings if not b.live.is_inference()]
        )
        self._versions = self._counted()
        self.lam, self.rule, self._lams = lam, rule, lams
        self._foreign = False

    def _counted(self) -> list[int]:
        """Return torch's version counter of each interpolated live tensor, 0 for inference tensors,
        which have none."""
        return [0 if b.live.is_inference() else b.live._version for b in self._floats]

    def _base_of(self, t: int) -> torch.Tensor | None:
        """Return the base of entry t, for a store that has not kept it."""
        assert self.sources is not None  # `_open` was asked before
        named = self.sources.reopen() if self._given is None else self._given
        base = next((named[name].detach() for name in self._floats[t].names if name in named), None)
        if base is not None and base.shape != self._floats[t].live.shape:
            raise WeightsError(
                f"base tensor `{self._floats[t].name}` is {list(base.shape)}, expected"
                f" {list(self._floats[t].live.shape)}",
                "pass the base tensors that were bound",
            )
        return base

    @_one_thread
    def checksum(self) -> int:
        """Return the checksum S = Σ_t odd(name_t) · Σ_j word_j · odd(j) mod 2⁶⁴ of the live
        tensors.

        word_j are a tensor's bytes as little-endian 64-bit words, zero-padded. Sums are comparable
        within one layout only.

        Example:
            before = weights.checksum()
            evaluate(model)
            assert weights.checksum() == before

        Cost: one read of the live copy; waits for the device.

        Raises:
            WeightsError: closed, or a live tensor no longer lies where it was bound.
        """
        return self._read_back()[0]

    @_one_thread
    def read_back(self, merge_again: bool = False) -> int:
        """Return `checksum()`, after each live tensor was compared with what the last switch wrote:
        sums of the two kinds are made from what memory holds, and from what was computed before it
        was stored. Tensors of which a store has no such sum are merged again and compared.

        Args:
            merge_again: also merge all tensors again, by other code than the switch's, and compare
                every bit, as `verify` does.

        Example:
            weights.set_lambda(0.6)
            checksum = weights.read_back()

        Cost: one read of the live copy; waits for the device.

        Raises:
            WeightsError: a tensor differs (named), or no λ is set.
        """
        store = self._open()
        if self.lam is None:
            raise WeightsError("no λ is set: the last switch did not finish", "call set_lambda")
        known = {t for t, written in enumerate(self._written_by(store)) if written is not None}
        merged = set(range(len(self._floats))) - (set() if merge_again else known)
        wrong = self._changed(store, merged)
        total, differing = self._read_back()
        if wrong or differing:
            self._foreign = True
            raise self._not_held([*wrong, *(name for name in differing if name not in wrong)])
        return total

    def _read_back(self) -> tuple[int, list[str]]:
        """Return the checksum, and the names of tensors whose own is not that of what was
        written."""
        store = self._open()
        self._check_pointers()
        assert self._memory is not None
        with self._order.ordered():
            sums = self._memory.sums()
        total = combine({binding.name: part for binding, part in zip(self._bindings, sums)})
        differing = [
            binding.name
            for binding, actual, written in zip(self._floats, sums, self._written_by(store))
            if written is not None and written.checksum != actual
        ]
        differing += self._overwritten(store, differing)
        # weights of the same λ have one checksum; if it differs, the next switch writes every byte
        if self.lam is not None and self._sums.setdefault(self._lams, total) != total:
            self._foreign = True
        self._foreign |= bool(differing)
        return total, differing

    def _overwritten(self, store: CompositeStore, known: Container[str]) -> list[str]:
        """Return the names, other than those in `known`, of tensors whose last switch started from
        what something else had written."""
        names = (self._floats[t].name for t in store.overwritten())
        return [name for name in names if name not in known]

    def _written_by(self, store: CompositeStore) -> list[Written | None]:
        """Return what the last switch wrote to each interpolated tensor, where the store knows."""
        if not self._is_recorded:
            return [None] * len(self._floats)
        if self._recorded is None:
            self._recorded = store.written()
        return self._recorded

    def _not_held(self, names: Sequence[str]) -> WeightsError:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return WeightsError(
            f"live tensor `{names[0]}`{more} does not hold the merge at λ = {self.lam}",
            "something else wrote to the weights; the next set_lambda writes all of them again",
        )

    def verify(self) -> bool:
        """Merge again from the sources, into scratch memory, and compare every bit with the live
        tensors, NaN payloads aside.

        Returns True, so that `assert weights.verify()` reads well.

        Example:
            weights.set_lambda(0.6)
            assert weights.verify()

        Cost: reads live and sources once; scratch of a few MB.

        Raises:
            WeightsError: a tensor differs (named), or no λ is set.
        """
        wrong = self.changed()
        if wrong:
            raise self._not_held(wrong)
        return True

    @_one_thread
    def changed(self) -> list[str]:
        """Return the names of live tensors whose bits are not those of a fresh merge at the current
        λ.

        Raises:
            WeightsError: closed, or no λ is set because a switch failed.
        """
        store = self._open()
        self._check_pointers()
        if self.lam is None:
            raise WeightsError("no λ is set: the last switch did not finish", "call set_lambda")

        wrong = self._changed(store, set(range(len(self._floats))))
        self._foreign |= bool(wrong)
        return wrong

    def _changed(self, store: CompositeStore, entries: Container[int]) -> list[str]:
        """Return the names of those of `entries`, and of tensors that are not interpolated, which
        do not hold a fresh merge."""
        import torch

        known_sums = {
            t: total
            for t in range(len(self._floats))
            if t in entries and (total := store.known_sum(t)) is not None
        }

        def differing_in(batch: Sequence[tuple[int, slice]]) -> list[int]:
            merged = store.merged_together(batch, [self._lams[t] for t, _ in batch])
            held = [self._floats[t].live.detach().view(-1)[span] for t, span in batch]
            if len(batch) > 1 and same_merge(torch.cat(merged), torch.cat(held)):
                return []
            pairs = zip(batch, merged, held)
            return [t for (t, _), one, other in pairs if not same_merge(one, other)]

        to_merge = {t for t in range(len(self._floats)) if t in entries} - known_sums.keys()
        lists = self._on_cores(differing_in, store.batches(to_merge))
        differing = {t for some in lists for t in some}
        sums = pa_kernels.checksum([self._floats[t].live for t in known_sums])
        differing |= {t for t, total in zip(known_sums, sums) if total != known_sums[t]}
        wrong = [binding.name for t, binding in enumerate(self._floats) if t in differing]
        wrong += [
            binding.name
            for binding in self._fixed
            if not equal_bits(binding.live, binding.base.to(binding.live.device))
        ]
        return wrong + self._overwritten(store, wrong)

    def effective_lambda(self) -> float:
        """Return the position of the rounded weights on the line: ⟨W − B, D − B⟩ / ‖D − B‖², over
        all interpolated weights.

        D is the delta's endpoint, which is instruct where the store is lossless.

        Numerics: rounding to a 16-bit dtype drops updates smaller than half a unit in the last
            place, so this can differ from λ by a factor at small λ. Under a rule it is the mean of
            the tensors' effective λ, each weighted by its ‖D − B‖²; `intended_lambda` is that mean
            of the λ themselves. NaN where base and instruct are equal.
        Cost: nothing where the switch has summed this as it wrote (dense, sparse); else reads live
            and sources once. fp32 products of pieces, summed in order in fp64.
        """
        moved, distance = self.projection()
        return moved / distance if distance else float("nan")

    def intended_lambda(self) -> float:
        """Return what `effective_lambda` would be without rounding: λ, or under a rule the mean of
        the tensors' λ, each weighted by its ‖D − B‖². NaN where base and instruct are equal, or no
        λ is set.

        Cost: that of `effective_lambda` under a rule, else nothing.
        """
        if self.lam is None or self.rule is None:
            return float("nan") if self.lam is None else self.lam
        aimed, distance = self.aim()
        return aimed / distance if distance else float("nan")

    @_one_thread
    def aim(self, names: Container[str] | None = None) -> tuple[float, float]:
        """Return Σ_t λ_t ‖D_t − B_t‖² and Σ_t ‖D_t − B_t‖² over the interpolated tensors called
        `names`, over all where None."""
        aimed = distance = 0.0
        for t, _, whole in self._products(names):
            aimed, distance = aimed + self._lams[t] * whole, distance + whole
        return aimed, distance

    @_one_thread
    def projection(self, names: Container[str] | None = None) -> tuple[float, float]:
        """Return ⟨W − B, D − B⟩ and ‖D − B‖² over the interpolated weights called `names`, over all
        where None."""
        moved = distance = 0.0
        for _, part, whole in self._products(names):
            moved, distance = moved + part, distance + whole
        return moved, distance

    def _products(self, names: Container[str] | None) -> Iterator[tuple[int, float, float]]:
        """Yield t, ⟨W − B, D − B⟩ and ‖D − B‖² of parts of the interpolated tensors called
        `names`."""
        store = self._open()
        wanted = [
            t for t, binding in enumerate(self._floats) if names is None or binding.name in names
        ]
        written = self._written_by(store)
        known = {t: w.products for t in wanted if (w := written[t]) and w.products}
        yield from ((t, *products) for t, products in known.items())
        others = set(wanted) - known.keys()
        yield from ((t, *parts) for t, parts in self._over_spans(store.products, others))

    def memory(self) -> Memory:
        """Return the bytes of the live copy and of what lies beside it: `live_bytes`,
        `device_bytes`, `host_bytes`, `mapped_bytes` (page cache of mapped files), `total_bytes`
        (the first three)."""
        beside = [
            *self._open().beside(),
            *(tensor for binding in self._fixed for tensor in binding.sources.values()),
        ]
        return measure((binding.live for binding in self._bindings), beside)

    def __repr__(self) -> str:
        if self._store is None:
            return "<LiveWeights, closed>"
        count = sum(binding.live.numel() for binding in self._bindings)
        rule = "" if self.rule is None else " by a rule"
        return (
            f"<LiveWeights at λ = {self.lam}{rule}: {len(self._bindings)} tensors, {count:,}"
            f" weights, {self.store}>"
        )

    def close(self) -> None:
        """Release the sources. The live tensors keep the λ they have; every other method raises
        from then on."""
        self._store = self.sources = self._memory = None
        self._bindings, self._floats, self._fixed, self._watched = [], [], [], []

    def __enter__(self) -> LiveWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _over_spans(
        self, work: Callable[[int, slice], T], entries: Container[int]
    ) -> Iterator[tuple[int, T]]:
        """Yield (t, work(t, span)) for every span of those interpolated tensors, in order; on a CPU
        one core per span."""
        store = self._open()
        spans = [
            (t, span) for t in range(len(self._floats)) if t in entries for span in store.spans(t)
        ]
        return zip((t for t, _ in spans), self._on_cores(lambda one: work(*one), spans))

    def _on_cores(self, work: Callable[[S], T], pieces: Iterable[S]) -> Iterable[T]:
        """Return `work` of every piece, in order; on a CPU one core per piece."""
        on_cpu = all(binding.live.device.type == "cpu" for binding in self._floats)
        return over_cores(work, pieces) if on_cpu else map(work, pieces)

    def _open(self) -> CompositeStore:
        if self._store is None or self.sources is None:
            raise WeightsError("these live weights are closed", "bind them again")
        self.sources.check()
        return self._store

    def _check_pointers(self) -> None:
        for name, tensor, pointer, form in self._watched:
            if tensor.dtype != form[2] and _form(tensor)[:2] == form[:2]:
                raise WeightsError(
                    f"live tensor `{name}` was bound as {form[2]}, and is {tensor.dtype} now",
                    f"{_REPLACED}; another dtype is asked for as the model is loaded (dtype=)",
                )
            if _form(tensor) != form:
                raise WeightsError(
                    f"live tensor `{name}` was bound as {form[2]} of shape {list(form[0])} and"
                    f" strides {list(form[1])}, and is {tensor.dtype} of shape {list(tensor.shape)}"
                    f" and strides {list(tensor.stride())} now",
                    "something transposed, viewed or resized it in place: load the model again",
                )
            if tensor.data_ptr() != pointer:
                raise WeightsError(
                    f"live tensor `{name}` has moved: bound at {pointer:#x}, now at"
                    f" {tensor.data_ptr():#x}",
                    _REPLACED,
                )


def _form(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Return shape, strides and dtype: the same bytes in another form are another weight."""
    return tensor.shape, tensor.stride(), tensor.dtype


def _check_store(store: Store, rounding: Rounding) -> None:
    if rounding.is_stochastic and not store.stochastic:
        raise UsageError(
            f"stochastic rounding of a delta that is held as `{store.describe()}`",
            "use the dense store",
        )
    if store.attached:
        raise UsageError(
            "factors attach to layers, and here are tensors alone",
            "use pa_fast.load, or merge them: attached=False",
        )


def _overwritten(names: Sequence[str]) -> WeightsError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return WeightsError(
        f"live tensor `{names[0]}`{more} did not hold what the last switch had left: something else"
        " wrote to it",
        "packed weights are switched from what they hold: resync(), or the next set_lambda, writes"
        " them anew from the base",
    )


def _writing(bound: Iterable[Binding]) -> AbstractContextManager[None]:
    """Return the mode in which the live tensors may be written: inference tensors only in inference
    mode."""
    import torch

    return inference() if any(b.live.is_inference() for b in bound) else torch.no_grad()
