"""Delta files: what is written comes back bit by bit, proves itself, fits one base, and appears
whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Sequence

import pa_kernels
import pytest
import safetensors
import torch
from pa_kernels import checksum
from pa_kernels.lowrank import padded

import pa_fast
from pa_fast.checkpoint.safetensors import read_header
from pa_fast.errors import CheckpointError, OutputError, PairError, WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.stores import file as delta_file
from pa_fast.stores.dense import DenseStore
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.lowrank import Factors, LowRankStore
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.sparse import SparseStore
from pa_fast.stores.store import Entry, Source, Store, tapped
from tests.stores import pairs

STORES = {
    "exact": SparseStore(),
    "topk": SparseStore("topk", 0.05, "global"),
    "dare": SparseStore("dare", 0.3),
    "lowrank": LowRankStore(rank=16),
    "lowrank 3": LowRankStore(rank=3),
    "packed": PackedStore(-0.2, 1.0),
    "packed speed": PackedStore(-0.2, 1.0, "speed"),
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["bf16", "mixed"],
)
def test_what_is_written_comes_back_and_gives_the_same_weights(
    store: SparseStore, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: pathlib.Path
) -> None:
    b, i = pairs.pair(*dtypes)
    path = pairs.saved(tmp_path / "d", b, i, store)
    file = DeltaFile.open(path)
    for source, entry in zip(pairs.sources(b, i), store.encode(pairs.sources(b, i))):
        found = pairs.parts(file.entry(source.name))
        assert found.keys() == pairs.parts(entry).keys()
        for part, tensor in pairs.parts(entry).items():
            assert torch.equal(
                found[part].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            ), (source.name, part)
    bound = pairs.live_like(b, dtypes[1])
    weights = pa_fast.LiveWeights.bind(bound, b, i, store)
    again, w = pairs.opened(path, b, dtypes[1])
    for lam in (0.3, 1.0, -0.2, 0.0):
        weights.set_lambda(lam)
        again.set_lambda(lam)
        assert weights.checksum() == again.checksum() and again.verify()
        assert all(torch.equal(as_integers(bound[name]), as_integers(w[name])) for name in b)
    assert (again.store, again.exact, again.lossless) == (
        store.describe(),
        store.exact,
        store.lossless,
    )
    assert repr(again).endswith(f"{store.describe()}>")


def test_factors_that_an_earlier_version_padded_are_read(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()

    def pad(source: Source, entry: Entry) -> Entry:
        return Factors(*padded(entry.u, entry.v)) if isinstance(entry, Factors) else entry

    wide = pairs.saved(tmp_path / "wide", b, i, tapped(LowRankStore(rank=3), pad))
    entries = [DeltaFile.open(wide).entry(name) for name in b]
    ranks = {entry.u.shape[-1] for entry in entries if isinstance(entry, Factors)}
    assert ranks == {16}
    narrow = pairs.saved(tmp_path / "narrow", b, i, LowRankStore(rank=3))
    (weights, w), (again, live) = (pairs.opened(path, b, torch.bfloat16) for path in (wide, narrow))
    for one in (weights, again):
        one.set_lambda(0.3)
        assert one.verify()
    assert all(torch.allclose(w[name].float(), live[name].float(), rtol=0.01) for name in b)


def test_the_file_is_plain_safetensors_that_says_what_it_is(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    path = tmp_path / "d.safetensors"
    delta_file.write(path, pairs.sources(b, i), SparseStore(), quick=("0" * 16, "f" * 16))
    with safetensors.safe_open(path, "pt") as file:
        names = file.keys()
        assert {name.partition("::")[0] for name in names} == b.keys()
        metadata = file.metadata()
        assert torch.equal(
            file.get_tensor("long::target"),
            i["long"][as_integers(b["long"]) != as_integers(i["long"])],
        )
    assert (
        metadata["format"] == "3"
        and metadata["store"] == "sparse"
        and metadata["lossless"] == "true"
    )
    assert (
        json.loads(metadata["base"])["quick"] == "0" * 16
        and json.loads(metadata["instruct"])["quick"] == "f" * 16
    )
    assert DeltaFile.open(path).nbytes == sum(
        info.nbytes for info in read_header(path).tensors.values()
    )


@pytest.mark.parametrize("store", [DenseStore(), PackedStore(), SparseStore()], ids=str)
def test_a_file_of_format_2_is_verified_by_its_own_checksums(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, i = pairs.pair()
    with monkeypatch.context() as patch:
        patch.setattr(delta_file, "FORMAT", "2")
        patch.setattr(pa_kernels, "checksum", lambda tensors, version=1: checksum(tensors, 1))
        pairs.saved(tmp_path / "old", b, i, store)
    # the codes in it have today's parity: `test_packed_files_of_older_formats_still_open`
    monkeypatch.setattr(PackedStore, "of_older_format", Store.of_older_format)
    weights, w = pairs.opened(tmp_path / "old", b)
    weights.set_lambda(1.0)
    assert all(torch.equal(as_integers(w[name]), as_integers(i[name])) for name in w)
    with DeltaFile.open(tmp_path / "old") as file:
        (note,) = file.description.notes
        assert "checksums of version 1, by which it is verified" in note
    data = bytearray((tmp_path / "old").read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(CheckpointError, match="content"):
        pairs.opened(tmp_path / "damaged", b)
    pairs.saved(tmp_path / "new", b, i, store)
    with DeltaFile.open(tmp_path / "new") as file:
        assert file.description.notes == []


def test_equal_deltas_are_equal_files(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    files = [
        pairs.saved(tmp_path / name, b, i, SparseStore("dare", 0.5)).read_bytes() for name in "xy"
    ]
    assert files[0] == files[1]


def test_names_of_any_length_and_alphabet_fit_the_header(tmp_path: pathlib.Path) -> None:
    names = ['"quoted\\"', "λ" * 300, "𝕏::where", "a" * 5000]
    b = {name: torch.zeros(3, 50) for name in names}
    i = {name: torch.ones(3, 50) for name in names}
    weights, w = pairs.opened(pairs.saved(tmp_path / "d", b, i, SparseStore()), b)
    weights.set_lambda(0.5)
    assert all(bool((w[name] == 0.5).all()) for name in names)


def test_another_base_is_refused_with_both_fingerprints(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    path = pairs.saved(tmp_path / "d", b, i, SparseStore())
    content = DeltaFile.open(path).description.base.content
    b["long"][69_999] += 1
    with pytest.raises(
        PairError, match=f"base of content {content}, this base has [0-9a-f]{{16}}"
    ) as caught:
        pairs.opened(path, b)
    assert caught.value.hint


def _shape(w: pairs.Tensors, b: pairs.Tensors) -> None:
    w["c"], b["c"] = torch.empty(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)


def _wider(w: pairs.Tensors, b: pairs.Tensors) -> None:
    w["c"] = w["c"].float()


def _base(w: pairs.Tensors, b: pairs.Tensors) -> None:
    b["c"] = b["c"].float()


def _more(w: pairs.Tensors, b: pairs.Tensors) -> None:
    w["more"], b["more"] = torch.empty(2), torch.zeros(2)


def _less(w: pairs.Tensors, b: pairs.Tensors) -> None:
    del w["c"], b["c"]


def _tied(w: pairs.Tensors, b: pairs.Tensors) -> None:
    w["a"], b["a"] = w["twin"], b["twin"]


REFUSALS = {
    _shape: (PairError, r"`c`: live is \[8\], the delta .* is for \[7\]"),
    _wider: (PairError, r"`c`: live is torch.float32, the delta .* is for torch.bfloat16"),
    _base: (PairError, r"`c`: base is torch.float32, the delta .* is for torch.bfloat16"),
    _more: (PairError, r"`more`: it is live, but .* has no delta of it"),
    _less: (PairError, r"`c`: .* has a delta of it, but there is no live tensor"),
    _tied: (PairError, r"`a` and `twin` share live storage, but .* has a delta of each"),
}


@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_live_tensors_that_the_delta_is_not_for_are_refused(
    change: object, tmp_path: pathlib.Path
) -> None:
    b, i = pairs.pair(shapes={**pairs.SHAPES, "twin": (65, 129)})
    path = pairs.saved(tmp_path / "d", b, i, SparseStore())
    w = pairs.live_like(b)
    change(w, b)  # type: ignore[operator]
    kind, message = REFUSALS[change]  # type: ignore[index]
    with pytest.raises(kind, match=message):
        pa_fast.LiveWeights.open(w, b, path)


def test_tied_live_tensors_take_the_one_delta_that_there_is(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    path = pairs.saved(tmp_path / "d", b, i, SparseStore())
    w = pairs.live_like(b)
    for side in (w, b):
        side |= {"0 head": side["a"], "steps": torch.arange(3)}
    weights = pa_fast.LiveWeights.open(w, b, path)
    weights.set_lambda(0.5)
    assert torch.equal(w["0 head"], torch.lerp(b["a"], i["a"], 0.5)) and torch.equal(
        w["steps"], torch.arange(3)
    )
    assert weights.verify()


def test_a_live_tensor_that_aliases_its_base_is_refused(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    path = pairs.saved(tmp_path / "d", b, i, SparseStore())
    with pytest.raises(WeightsError, match="aliases"):
        pa_fast.LiveWeights.open(b, b, path)


class Failing(SparseStore):
    """A store whose last tensor cannot be encoded."""

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        yield from super().encode(sources[:-1])
        raise RuntimeError("no more")


def test_a_failed_encode_leaves_what_was_there_and_nothing_else(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    path = pairs.saved(tmp_path / "d", b, i, SparseStore())
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        pairs.saved(path, b, i, SparseStore())
    with pytest.raises(RuntimeError, match="no more"):
        delta_file.write(path, pairs.sources(b, i), Failing(), overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["d"]
    (tmp_path / ".d.pa_fast.partial").write_bytes(b"x" * 10**6)  # what a killed run leaves
    delta_file.write(path, pairs.sources(b, i), SparseStore(), overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["d"]
    with pytest.raises(OutputError, match="is a folder"):
        delta_file.write(tmp_path, pairs.sources(b, i), SparseStore(), overwrite=True)


def test_no_entry_outlives_the_next_one(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    made: list[weakref.ref[Entry]] = []

    class Watching(SparseStore):
        def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
            for entry in super().encode(sources):
                assert sum(one() is not None for one in made) <= 1
                made.append(weakref.ref(entry))
                yield entry

    pairs.saved(tmp_path / "d", b, i, Watching())
    assert len(made) == len(b)


def test_names_must_be_distinct(tmp_path: pathlib.Path) -> None:
    b, i = pairs.pair()
    twice = [*pairs.sources(b, i), pairs.sources(b, i)[0]]
    with pytest.raises(PairError, match="`a` is given twice"):
        delta_file.write(tmp_path / "d", twice, SparseStore())


@pytest.mark.parametrize("content", [b"notes\n", b"", b"\x00" * 64, b"\xff" * 64])
def test_what_is_no_delta_gets_the_hint_to_give_one(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"notes\.txt") as caught:
        DeltaFile.open(tmp_path / "notes.txt")
    assert (caught.value.hint or "").startswith("give a file that `pa-fast encode` wrote")
