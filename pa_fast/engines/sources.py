"""Sources of live weights from two checkpoint folders: read by transformers, compared with the
files, and watched for later changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.content import FileWatcher
from pa_fast.checkpoint.folder import check_companions, resolve
from pa_fast.checkpoint.pair import config_notes, sides_of_model
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.vocabulary import check_vocabulary, extended, mistaken_sides, untrained_rows
from pa_fast.engines.attached import attachable, attached
from pa_fast.engines.content import of_pair
from pa_fast.engines.endpoints import EndpointCheck
from pa_fast.engines.loading import Loaded, Reading, allocate, base_tensors, load_pair
from pa_fast.engines.options import LoadOptions, identity
from pa_fast.engines.ranks import Alone, Ranks
from pa_fast.engines.tokenizer import stop_tokens, tokenizer_of
from pa_fast.live import opening, planner
from pa_fast.live.memory import FreeMemory
from pa_fast.live.planner import Plan
from pa_fast.live.sources import Sources
from pa_fast.live.weights import LiveWeights
from pa_fast.stores.store import TensorSize

if TYPE_CHECKING:
    import torch


class FolderSources(Sources):
    """Sources from a base and an instruct folder; with a delta file both sides are the base.

    The constructor loads both sides, as memory maps of their files where possible. `allocate` gives
    the model memory of its own, and `bind` makes the model follow λ.

    Attributes:
        module: the transformers model whose weights follow λ.
        live: its parameters and persistent buffers by name.
        tokenizer, stop_tokens: used at every λ.
        identity: values that must be equal for a sweep to be resumed.
        plan: store and residency; None if a delta file or attached factors decide them.
        store: description of the store, in one line.
        notes: notes for the user.
    """

    def __init__(
        self, base: str | Path, instruct: str | Path, options: LoadOptions, ranks: Ranks | Alone
    ):
        self._options, self._ranks = options, ranks
        # meshes are made by all ranks together: before the first step in which one of them may fail
        sharding = ranks.sharding()
        self._is_mapped = True
        with_delta = options.description is not None
        with (
            ranks.step("loading"),
            Checkpoint.open(resolve(base)) as b,
            Checkpoint.open(resolve(instruct)) as i,
        ):
            self._folders = b.folder, i.folder
            check_companions(i.folder)
            b, i, aligned, differences = sides_of_model(b, i, options.pairing)
            self._reading = Reading.of(b, i, options.pairing.strip_prefix, aligned.apart)
            rows = extended(aligned.base.tensors, i.tensors, b.config, i.config)
            self.notes = [
                *(options.description.notes if options.description else ()),
                *check_vocabulary(b, i, rows, options.pairing.extra_rows),
                *(() if with_delta else untrained_rows(b, i)),
                *config_notes(differences),
                *aligned.notes,
                *(() if with_delta else mistaken_sides(b, i)),
            ]
            loaded = load_pair(
                b,
                i,
                options.live_dtype(),
                sharding,
                options.description.tensors if options.description else (),
                extra_rows=bool(rows),
                reading=self._reading,
            )
            self._contents = loaded.contents
            if with_delta:
                self._contents.pop("instruct").close()  # it is the base again
            traced = of_pair(loaded.module, b.tensors, i.tensors)
            self.plan = _planned(options, loaded)
            self.store = options.described if self.plan is None else self.plan.store.describe()
            self._watcher = FileWatcher(b, i)
            self._watcher.check_names()
            own = options.tokenizer
            self.tokenizer = tokenizer_of(i.folder if own is None else resolve(own))
            if with_delta and own is None and self.tokenizer is not None:
                self.notes.append(
                    "the tokenizer at every λ is base's, for a delta file holds none; choose"
                    " instruct's with tokenizer (--tokenizer)"
                )
            self.identity = identity(options, b, i, self.store, self.tokenizer)
        for content in self._contents.values():
            content.check_source(ranks)
        if options.rounding.is_stochastic:
            traced.check_elementwise(
                {name: tensor for name, tensor in loaded.live.items() if tensor.is_floating_point()}
            )
        self.module = loaded.module
        self.live, self._loaded = loaded.live, loaded
        super().__init__(loaded.base, loaded.instruct, loaded.intermediate_dtype, traced.names)

    def allocate(self) -> None:
        """Give the model new memory on its device."""
        with self._ranks.step("allocating"):
            allocate(self._loaded, self._options.device)
            self._watcher.check()

    def bind(self) -> Any:
        """Return the live weights of the model at λ = 0, after the endpoint check.

        Raises:
            EngineError, WeightsError: the endpoint check failed.
            DataError: a file changed meanwhile, or a source is not finite.
        """
        options, loaded = self._options, self._loaded
        check = EndpointCheck.of(loaded, options) if options.endpoint_check else EndpointCheck({})
        self.stop_tokens = stop_tokens(self.tokenizer, loaded.reference, loaded.module)
        del loaded.reference
        with self._ranks.step("binding"):
            self._watcher.check()
            weights = self._bound(check)
            self._is_mapped = bool(weights.memory().mapped_bytes)
        with self._ranks.step("fingerprinting"):
            for side, content in self._contents.items():
                self.identity[f"{side}_content"] = content.finish()
                self._watcher.know(content.checkpoint, content.sums)
                content.close()
        check.check_logits(self.module)
        self.notes += [] if self.plan is None else [f"the delta is held {self.plan.describe()}"]
        self.notes += [*loaded.notes, *check.notes]
        del self._loaded
        return weights

    def _bound(self, check: EndpointCheck) -> Any:
        options = self._options
        apart = attachable(self.module).keys() if options.attached else ()
        arguments: dict[str, Any] = {"allow_nonfinite": options.allow_nonfinite, "apart": apart}
        if options.delta is None:
            store = self.plan or options.store
            if options.attached:
                store = replace(options.store, attached=False)  # type: ignore[type-var]
            weights = LiveWeights.between(
                self.live, self, store, options.rounding, endpoints=check.endpoints, **arguments
            )
        else:
            with opening.reopened(options.delta, options.description) as file:
                self._watcher.add(file.file)
                weights = LiveWeights.after(self.live, self, file, **arguments)
            weights.check_endpoints(check.endpoints or {})
        return attached(self.module, weights) if options.attached else weights

    def check(self) -> None:
        """Raise DataError, naming the file, if a file that is still mapped has changed."""
        if self._is_mapped:
            self._watcher.check()

    def reopen(self) -> Mapping[str, torch.Tensor]:
        return base_tensors(*self._folders, self.live, self._reading)

    def note_read(self, tensor: torch.Tensor, start: int, piece: torch.Tensor) -> None:
        for content in self._contents.values():
            content.on_read(tensor, start, piece)


def _planned(options: LoadOptions, loaded: Loaded) -> Plan | None:
    """Return the plan of a pair that is not allocated yet; None if a delta file or attached factors
    decide it."""
    if options.description is not None or options.attached:
        return None
    must_be_dense = options.auto and options.rounding.is_stochastic
    store = options.store if must_be_dense or not options.auto else "auto"
    reason = {"reason": "stochastic rounding is of dense deltas alone"} if must_be_dense else {}
    return planner.plan(
        _sizes(loaded),
        store,
        options.residency,
        FreeMemory.of(options.device),
        allocated=False,
        **reason,
    )


def _sizes(loaded: Loaded) -> list[TensorSize]:
    """Return the sizes of each live float tensor, under its first name, and of its dense delta."""
    first = {
        id(tensor): name
        for name, tensor in reversed(loaded.live.items())
        if tensor.is_floating_point()
    }
    return [
        TensorSize(
            n,
            loaded.live[n].nbytes,
            loaded.base[n].nbytes + loaded.instruct[n].nbytes,
            (loaded.base[n], loaded.instruct[n]),
        )
        for n in first.values()
    ]
