"""What every registered store must do, whatever it keeps: a new one runs through all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pa_kernels
import pytest
import torch

import pa_fast
from pa_fast.errors import UsageError
from pa_fast.stores import registry
from pa_fast.stores.composite import CompositeStore
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.sparse import SparseStore
from pa_fast.stores.store import Entry, Overwritten, Source, Store, TensorSize, tapped
from tests.stores import pairs
from tests.stores.toy import ToyStore

OPTIONS: list[Store] = [
    PackedStore(-0.5, 1.5),
    PackedStore(layout="speed"),
    PackedStore(-0.2, 1.5, "speed"),
    SparseStore("topk", 0.01),
    SparseStore("dare", 0.5),
    LowRankStore(rank=16),
    LowRankStore(energy=0.9),
]
"""Stores with other options than their own defaults."""

LAMBDAS = (0.3, 1.0, 0.05, 0.0, 0.7)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.STORES, "toy", ToyStore)


@pytest.fixture(
    params=[*registry.STORES, "toy", *OPTIONS],
    ids=lambda param: param if isinstance(param, str) else param.describe(),
)
def store(request: pytest.FixtureRequest) -> Store:
    return registry.named(request.param)


@pytest.fixture
def sources() -> list[Source]:
    """Tensors of which 3 % changed, in bf16 alone and with a base in fp32."""
    same = pairs.sources(*pairs.pair(changed=0.03))
    mixed = pairs.sources(*pairs.pair(torch.float32, torch.bfloat16, changed=0.03))
    return [*same, *(replace(source, name=f"{source.name} mixed") for source in mixed)]


def bound(sources: list[Source], entries: list[Entry]) -> tuple[CompositeStore, list[torch.Tensor]]:
    live = [torch.full(s.base.shape, torch.nan, dtype=s.dtype) for s in sources]
    bases = [source.base for source in sources]
    composite = CompositeStore(live, bases, entries, [s.intermediate_dtype for s in sources])
    composite.restore_()
    return composite, live


def each(composite: CompositeStore, live: list[torch.Tensor]) -> Iterator[tuple[int, slice]]:
    return ((t, span) for t in range(len(live)) for span in composite.spans(t))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*map(as_bytes, (a, b)))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_what_it_says_of_itself(store: Store) -> None:
    assert store.describe().startswith(store.name) and store.describe().isprintable()
    assert registry.named(store) is store
    assert len(store.kinds) == len({*store.kinds}) and store.part_names
    assert all({*store.host_parts} <= {*store.parts_of(kind)} for kind in store.kinds)
    for kind in store.kinds:
        assert registry.kinds()[kind] is type(store)
    if store.range is not None:
        assert store.range[0] <= 0 and store.range[1] >= 1
    fresh = type(store).of_options()
    assert fresh.describe() == type(store)().describe()
    if not store.options:
        with pytest.raises(UsageError, match="takes no options"):
            registry.encoding(store.name, {"rank": 3})


def test_an_estimate_is_of_the_right_order(store: Store, sources: list[Source]) -> None:
    pair = [source for source in sources if source.base.numel() > 1000]
    sizes = [
        TensorSize(s.name, s.instruct.nbytes, s.base.nbytes + s.instruct.nbytes, s.on_device())
        for s in pair
    ]
    estimate = store.estimate(sizes)
    if estimate is not None:
        assert 0 < estimate <= sum(size.beside_bytes for size in sizes)


def test_entries_come_one_by_one_and_belong_to_a_store(store: Store, sources: list[Source]) -> None:
    encoded = store.encode(sources)
    assert iter(encoded) is encoded
    count = 0
    for _source, entry in zip(sources, encoded):
        owner = registry.owner(entry)
        assert isinstance(entry, owner.entry) and owner.kind(entry) in owner.kinds
        parts = owner.parts(entry)
        assert tuple(parts) == owner.parts_of(owner.kind(entry))
        assert owner.nbytes(entry) == sum(part.nbytes for part in parts.values())
        copies = owner.parts(owner.pinned(entry, torch.clone))
        assert all(equal(copies[name], part) for name, part in parts.items())
        count += 1
    assert count == len(sources) and next(encoded, None) is None


def test_every_switch_gives_the_fresh_merge(store: Store, sources: list[Source]) -> None:
    composite, live = bound(sources, list(store.encode(sources)))
    own = [0.1 * (t % 10) for t in range(len(live))]
    for lam in (*LAMBDAS, own):
        lams = lam if isinstance(lam, list) else [lam] * len(live)
        composite.check(lam)
        composite.set_(lam)
        for t, span in each(composite, live):
            piece = live[t].view(-1)[span]
            assert equal(piece, composite.merged(t, span, lams[t])), (sources[t].name, lams[t])
            base, end = composite.endpoints(t, span)
            if store.exact:
                expected = torch.empty_like(piece)
                pa_kernels.lerp_([expected], [base], [end], lams[t])
                assert equal(piece, expected), (sources[t].name, lams[t])


def test_spans_are_all_elements_once(store: Store, sources: list[Source]) -> None:
    composite, live = bound(sources, list(store.encode(sources)))
    seen = [torch.zeros(w.numel(), dtype=torch.int32) for w in live]
    for t, span in each(composite, live):
        seen[t][span] += 1
    assert all(bool((count == 1).all()) for count in seen)


def test_the_ends_are_the_sides(store: Store, sources: list[Source]) -> None:
    entries = list(store.encode(sources))
    composite, live = bound(sources, entries)
    for lam, side in ((0.0, "base"), (1.0, "instruct")):
        composite.set_(lam)
        for source, w in zip(sources, live):
            if side == "base" or store.lossless:
                assert equal(w, getattr(source, side).to(w.dtype)), (source.name, lam)
    if not store.lossless and any(isinstance(entry, store.entry) for entry in entries):
        ends = [source.instruct for source in sources]
        assert not all(equal(w, end) for w, end in zip(live, ends))


def test_a_foreign_write_is_found_or_written_over(store: Store, sources: list[Source]) -> None:
    composite, live = bound(sources, list(store.encode(sources)))
    composite.set_(0.5)
    expected = [w.clone() for w in live]
    live[0].view(torch.int16)[-1, -1] ^= 1
    try:
        composite.set_(0.5)
    except Overwritten as overwritten:
        assert overwritten.entries == [0]
        composite.restore_()
        composite.set_(0.5)
    assert all(equal(w, was) for w, was in zip(live, expected))
    live[0].zero_()
    composite.rewrite_({0})
    try:
        composite.set_(0.5)
    except Overwritten:
        composite.restore_()
        composite.set_(0.5)
    assert all(equal(w, was) for w, was in zip(live, expected))


def test_a_piece_can_be_written_alone(store: Store, sources: list[Source]) -> None:
    composite, live = bound(sources, list(store.encode(sources)))
    for t, span in each(composite, live):
        composite.write_(t, span, 0.7)
        assert equal(live[t].view(-1)[span], composite.merged(t, span, 0.7))


def test_all_that_is_kept_is_counted(store: Store, sources: list[Source]) -> None:
    entries = list(store.encode(sources))
    composite, _ = bound(sources, entries)
    kept = sum(t.nbytes for t in composite.beside())
    assert kept >= sum(registry.owner(entry).nbytes(entry) for entry in entries) * 0.9


def test_past_its_range_nothing_is_written(store: Store, sources: list[Source]) -> None:
    composite, live = bound(sources, list(store.encode(sources)))
    composite.set_(0.5)
    before = [w.clone() for w in live]
    if store.range is None:
        composite.check([2.5] * len(live))
        return
    for lam in (store.range[0] - 0.1, store.range[1] + 0.1):
        with pytest.raises(UsageError, match=f"the range that the {store.name} delta is for"):
            composite.check(lam)
    assert all(equal(w, was) for w, was in zip(live, before))


def test_a_file_gives_back_what_was_bound(store: Store, tmp_path: Path) -> None:
    base, instruct = pairs.pair(changed=0.03)
    path = pairs.saved(tmp_path / "delta", base, instruct, store)
    with DeltaFile.open(path) as file:
        told = file.description
        assert (told.store, told.options) == (store.name, store.describe())
        assert (told.exact, told.lossless) == (store.exact, store.lossless)
        for (name, tensor), entry in zip(
            told.tensors.items(), store.encode(pairs.sources(base, instruct))
        ):
            owner, read = registry.owner(entry), file.entry(name)
            assert isinstance(read, owner.entry) and tensor.kind == owner.kind(read)
            assert owner.misfit(read, base[name]) is None
            parts = owner.parts(read)
            assert all(equal(parts[n], part) for n, part in owner.parts(entry).items())
    live = pairs.live_like(base)
    weights = pa_fast.LiveWeights.bind(live, base, instruct, store)
    opened, other = pairs.opened(path, base)
    for lam in LAMBDAS:
        weights.set_lambda(lam)
        opened.set_lambda(lam)
        assert all(equal(live[name], other[name]) for name in live) and opened.verify()
    assert opened.memory().live_bytes == weights.memory().live_bytes


def test_noise_is_for_those_that_say_so(store: Store) -> None:
    base, instruct = pairs.pair(changed=1.0)
    live = pairs.live_like(base)
    if store.stochastic:
        weights = pa_fast.LiveWeights.bind(live, base, instruct, store, "stochastic", seed=3)
        weights.set_lambda(0.3)
        assert weights.verify()
    else:
        with pytest.raises(UsageError, match="stochastic rounding of a delta that is held as"):
            pa_fast.LiveWeights.bind(live, base, instruct, store, "stochastic", seed=3)


def test_a_tap_sees_every_entry_and_changes_nothing_else(
    store: Store, sources: list[Source]
) -> None:
    seen: list[str] = []

    def pass_on(source: Source, entry: Entry) -> Entry:
        seen.append(source.name)
        return entry

    tap = tapped(store, pass_on)
    tap.attached = True  # of the tap alone
    assert tap.describe() == store.describe() and not store.attached
    assert (tap.name, tap.exact, tap.lossless) == (store.name, store.exact, store.lossless)
    assert len(list(tap.encode(sources))) == len(sources)
    assert seen == [source.name for source in sources]


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("sparse", {"select": "topk", "density": 1.5}, "density 1.5, expected one above 0 and"),
        ("sparse", {"select": "topk"}, "no density, expected one above 0 and up to 1"),
        ("sparse", {"select": "dare", "density": 0.5, "seed": -1}, "seed -1, expected a number"),
        ("lowrank", {"energy": 2.0}, "energy 2.0, expected a number above 0 and up to 1"),
        ("lowrank", {"rank": 0}, "rank 0, expected a number of at least 1"),
        ("lowrank", {"budget": 0}, "budget 0, expected a number of at least 1"),
        ("packed", {"range": (1.0, 0.0)}, "range 1:0, expected the least λ from -1e6 to 0 and the"),
        ("packed", {"range": (0.0, math.inf)}, "range 0:inf, expected the least λ"),
    ],
)
def test_an_option_out_of_its_range_is_refused_with_the_range(
    format: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        registry.encoding(format, options)
