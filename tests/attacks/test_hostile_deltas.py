"""Delta files made to mislead, crash, or write outside a tensor: each refused by file and tensor,
and no byte is touched."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pa_kernels
import pytest
import torch
from hypothesis import given, settings
from pa_kernels import checksum
from pa_kernels.packed import of_lower_parity
from safetensors import safe_open
from safetensors.torch import save_file

import pa_fast
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.errors import PaFastError
from pa_fast.stores.file import sum_of
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.sparse import SparseStore
from tests.stores import pairs

SHAPES = {"few": (70, 1000), "many": (50, 100), "all": (9,)}
GUARD = 4096
"""Elements before and after every live tensor, where nothing may be written."""

CANARY = 12345.0


@dataclass
class Forged:
    """A delta file taken apart: its metadata, what it says of each tensor, and its parts."""

    metadata: dict[str, Any]
    about: dict[str, Any]
    parts: dict[str, torch.Tensor]
    summed: str

    @classmethod
    def of(cls, path: Path) -> Forged:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
        return cls(metadata, json.loads(metadata.pop("tensors")), tensors, metadata["sum"])

    def save(self, path: Path, *, agreeing: bool = True) -> None:
        """Write it; the sum over the metadata made right again, unless it was changed itself or is
        not to agree."""
        metadata = {"tensors": json.dumps(self.about), **self.metadata}
        if agreeing and metadata.get("sum") == self.summed:
            metadata["sum"] = sum_of(metadata)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.parts.items()}, path, metadata
        )

    def agree(self, name: str) -> None:
        """Make the sum of a tensor's parts right again."""
        own = {
            key.rpartition("::")[2]: part
            for key, part in self.parts.items()
            if key.rpartition("::")[0] == name
        }
        order = [
            part
            for part in ("codes", "target", "where", "starts", "base", "span", "u", "v")
            if part in own
        ]
        self.about[name]["data"] = as_hex(
            combine({part: pa_kernels.checksum([own[part]])[0] for part in order})
        )


def guarded(base: pairs.Tensors) -> tuple[pairs.Tensors, Callable[[], bool]]:
    """Live tensors inside larger ones, and whether everything around them is as it was."""
    around = {
        name: torch.full((tensor.numel() + 2 * GUARD,), CANARY, dtype=tensor.dtype)
        for name, tensor in base.items()
    }
    live = {name: around[name][GUARD:-GUARD].view(tensor.shape) for name, tensor in base.items()}

    def untouched() -> bool:
        expected = {
            name: torch.full((), CANARY, dtype=tensor.dtype) for name, tensor in around.items()
        }
        return all(
            bool((t[:GUARD] == expected[n]).all() and (t[-GUARD:] == expected[n]).all())
            for n, t in around.items()
        )

    return live, untouched


@pytest.fixture(scope="module")
def base() -> pairs.Tensors:
    return made()[0]


def made() -> tuple[pairs.Tensors, pairs.Tensors]:
    b, i = pairs.pair(shapes=SHAPES, changed=0.02)
    i["many"] = (b["many"].float() + 0.01).bfloat16()
    i["many"].view(-1)[::5] = b["many"].view(-1)[::5]
    i["all"] = b["all"] + 1
    return b, i


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good file of each store."""
    folder = tmp_path_factory.mktemp("good")
    stores = {"sparse": SparseStore(), "lowrank": LowRankStore(rank=16)}
    return {name: pairs.saved(folder / name, *made(), store) for name, store in stores.items()}


def refused(path: Path, base: pairs.Tensors) -> str:
    """What is said when `path` is opened; the bytes around the live tensors are looked at too."""
    live, untouched = guarded(base)
    with pytest.raises(PaFastError) as caught:
        pa_fast.LiveWeights.open(live, base, path)
    assert untouched()
    assert str(path) in caught.value.message and caught.value.hint
    return caught.value.message


def part(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[Forged], None]:
    """Change one part, in place or by what is returned, and make the sum right."""

    def forge(file: Forged) -> None:
        changed = change(file.parts[name])
        if changed is not None:
            file.parts[name] = changed
        file.agree(name.rpartition("::")[0])

    return forge


def about(name: str, **changes: Any) -> Callable[[Forged], None]:
    return lambda file: file.about[name].update(changes)


def metadata(**changes: str) -> Callable[[Forged], None]:
    return lambda file: file.metadata.update(changes)


def put(at: int, value: float) -> Callable[[torch.Tensor], None]:
    def change(tensor: torch.Tensor) -> None:
        tensor.view(-1)[at] = value

    return change


def move_last_bit(words: torch.Tensor) -> None:
    """Clear one bit of the last word that has any, and set one of the last word of the tile."""
    at = int(words.nonzero()[-1])
    words[at] &= words[at] - 1
    words[-1] = 1


SPARSE: dict[str, tuple[Callable[[Forged], Any], str]] = {
    "another format": (metadata(format="4"), "delta format `4`, expected 1, 2, 3"),
    "another sum": (metadata(sum="0" * 16), "expected `0000000000000000`: somebody edited them"),
    "no sum of the metadata": (lambda f: f.metadata.pop("sum"), "metadata `sum` is missing"),
    "a sum in the format that has none": (
        metadata(format="1"),
        "metadata `sum` is not of this format",
    ),
    "no format": (lambda f: f.metadata.pop("format"), "a safetensors file, but no delta"),
    "a key missing": (lambda f: f.metadata.pop("exact"), "metadata `exact` is missing"),
    "a key too many": (metadata(extra="1"), "metadata `extra` is not of this format"),
    "a store that colours terminals": (
        metadata(options="\x1b[31m"),
        "metadata `options` is not a short printable text",
    ),
    "a store without end": (
        metadata(store="x" * 10**6),
        "metadata `store` is not a short printable text",
    ),
    "neither true nor false": (
        metadata(lossless="1"),
        "metadata `lossless` is `1`, expected true or false",
    ),
    "a side that is no object": (metadata(base="[1]"), "metadata `base`: found JSON list"),
    "a side without fingerprint": (
        metadata(base='{"content":1,"quick":null}'),
        "expected two fingerprints",
    ),
    "surrogates": (
        metadata(base='{"content":"\\ud800","quick":null}'),
        "expected two fingerprints",
    ),
    "another base": (
        metadata(base=json.dumps({"content": "0" * 16, "quick": None})),
        "encoded from a base of content 0000",
    ),
    "tensors that are no JSON": (metadata(tensors="{"), "metadata `tensors`: not JSON"),
    "a JSON bomb": (metadata(tensors="[" * 100_000), "JSON nested too deep"),
    "a tensor twice": (metadata(tensors='{"few":1,"few":2}'), "`few` appears twice"),
    "tensors that are none": (metadata(tensors='{"few":1}'), "`few"),
    "no tensors": (metadata(tensors="{}"), "belongs to no tensor"),
    "an entry too little": (
        lambda f: f.about["few"].pop("ends"),
        "tensor `few`: expected an object of kind, shape",
    ),
    "a kind of another world": (about("few", kind="zip"), "tensor `few`: `kind` is `zip`"),
    "a kind that is a list": (about("few", kind=["index"]), "tensor `few`: `kind`"),
    "negative shape": (about("few", shape=[-70, -1000]), "tensor `few`: `shape`"),
    "boolean shape": (about("few", shape=[True, 70_000]), "tensor `few`: `shape`"),
    "shape that wraps": (about("few", shape=[2**32, 2**32]), "tensor `few`: `shape`"),
    "empty but huge shape": (about("few", shape=[0, 2**62, 4]), "tensor `few`: `shape`"),
    "more dimensions than memory": (about("few", shape=[1] * 40), "tensor `few`: `shape`"),
    "shape of another tensor": (about("few", shape=[7, 1000]), "live is [70, 1000], the delta"),
    "dtype of another world": (about("few", live="F31"), "tensor `few`: `live` is `F31`"),
    "integers": (about("few", base="I32"), "tensor `few`: `base` is `I32`"),
    "via nothing": (about("few", via=5), "tensor `few`: `via` is `5`"),
    "no sum": (about("few", data="x"), "tensor `few`: `data` is `x`"),
    "one end": (about("few", ends=["0" * 16]), "tensor `few`: `ends`"),
    "wrong sum": (about("few", data="0" * 16), "tensor `few`: content"),
    "wrong end": (about("few", ends=["0" * 16, "0" * 16]), "`few` at λ = 1 has checksum"),
    "a part missing": (lambda f: f.parts.pop("few::base"), "tensor `few::base` is missing"),
    "a part too many": (
        lambda f: f.parts.update(x=torch.zeros(1)),
        "tensor `x` belongs to no tensor",
    ),
    "where of another width": (
        part("few::where", lambda t: t.int()),
        "tensor `few::where` is I32 [",
    ),
    "starts of another width": (
        part("few::starts", lambda t: t.int()),
        "tensor `few::starts` is I32",
    ),
    "base of another dtype": (part("few::base", lambda t: t.float()), "tensor `few::base` is F32"),
    "fewer targets": (part("few::target", lambda t: t[:-1]), "tensor `few::target` is BF16"),
    "values in a square": (part("few::base", lambda t: t[None]), "tensor `few::base` is BF16 [1,"),
    "fewer positions": (part("few::where", lambda t: t[:-1]), "tensor `few`: where has shape"),
    "fewer starts": (part("few::starts", lambda t: t[:-1]), "tensor `few`: starts has shape"),
    "a position outside": (
        part("few::where", put(-1, 65_535)),
        "tensor `few`: position 131071 in a tensor of 70000",
    ),
    "positions that fall": (part("few::where", put(0, 65_535)), "tensor `few`: place"),
    "starts below 0": (part("few::starts", put(1, -1)), "tensor `few`: starts go from -1"),
    "starts past the end": (part("few::starts", put(1, 2**62)), "tensor `few`: starts go from"),
    "starts that leave entries out": (part("few::starts", put(-1, 0)), "tensor `few`: starts go"),
    "a bit past the end": (
        part("many::where", lambda t: move_last_bit(t)),
        "tensor `many`: position 8160 in a tensor of 5000",
    ),
    "more bits than starts": (part("many::where", put(0, -1)), "tensor `many`: "),
    "a whole of another shape": (
        part("all::target", lambda t: t[:-1]),
        "tensor `all::target` is BF16 [8]",
    ),
    "a whole in integers": (
        part("all::target", lambda t: t.view(torch.int16)),
        "tensor `all::target` is I16",
    ),
    "base values that are not the base's": (
        part("few::base", put(5, 3.0)),
        "`few` at λ = 0 has checksum",
    ),
    "another target": (part("few::target", put(5, 3.0)), "`few` at λ = 1 has checksum"),
    "not a number": (
        part("few::target", put(5, float("nan"))),
        "target of tensor `few` has 1 non-finite",
    ),
    "another kind": (about("few", kind="bitmap"), "tensor `few::where` is U16"),
    "factors of no matrix": (
        about("few", kind="factors"),
        "tensor `few::base` belongs to no tensor",
    ),
}
LOWRANK: dict[str, tuple[Callable[[Forged], Any], str]] = {
    "rows too many": (
        part("few::u", lambda t: torch.cat([t, t])),
        "tensor `few::u` is BF16 [140, 16]",
    ),
    "ranks that disagree": (part("few::v", lambda t: t[:-1]), "tensor `few::v` is BF16 [15, 1000]"),
    "factors of two dtypes": (part("few::v", lambda t: t.float()), "tensor `few::v` is F32"),
    "factors of one dimension": (
        part("few::u", lambda t: t.view(-1)),
        "tensor `few::u` is BF16 [1120]",
    ),
    "factors in integers": (
        part("few::u", lambda t: t.view(torch.int16)),
        "tensor `few::u` is I16",
    ),
    "factors of a list": (about("few", shape=[70_000]), "tensor `few::u` is BF16 [70, 16]"),
    "infinite factors": (
        part("few::v", put(3, float("inf"))),
        "v of tensor `few` has 1 non-finite",
    ),
}


@pytest.mark.parametrize("attack", SPARSE | LOWRANK)
def test_each_lie_is_refused_by_name(
    attack: str, good: dict[str, Path], base: pairs.Tensors, tmp_path: Path
) -> None:
    forge, message = (SPARSE | LOWRANK)[attack]
    forged = Forged.of(good["sparse" if attack in SPARSE else "lowrank"])
    forge(forged)
    forged.save(tmp_path / "bad")
    assert message in refused(tmp_path / "bad", base)


@pytest.mark.parametrize(
    ("store", "kinds"),
    [("sparse", {"index", "bitmap", "whole"}), ("lowrank", {"factors", "whole"})],
)
def test_a_file_taken_apart_and_put_together_opens(
    store: str, kinds: set[str], good: dict[str, Path], base: pairs.Tensors, tmp_path: Path
) -> None:
    forged = Forged.of(good[store])
    assert {about["kind"] for about in forged.about.values()} == kinds
    for name in base:
        forged.agree(name)
    forged.save(tmp_path / "same")
    live, untouched = guarded(base)
    weights = pa_fast.LiveWeights.open(live, base, tmp_path / "same")
    for lam in (0.3, 1.0):
        weights.set_lambda(lam)
        assert weights.verify() and untouched()


@pytest.mark.parametrize(
    "forge",
    [
        metadata(options="sparse exact "),
        metadata(lossless="false"),
        metadata(exact="false"),
        metadata(pa_fast="9"),
        metadata(store="packed"),
        about("few", via="F16"),
    ],
)
def test_a_word_that_was_edited_by_hand_is_refused(
    forge: Callable[[Forged], None], good: dict[str, Path], base: pairs.Tensors, tmp_path: Path
) -> None:
    forged = Forged.of(good["sparse"])
    forge(forged)
    forged.save(tmp_path / "edited", agreeing=False)
    assert "somebody edited them" in refused(tmp_path / "edited", base)


def test_a_file_of_the_format_without_sum_still_opens(
    base: pairs.Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pa_kernels, "checksum", lambda tensors, _=1: checksum(tensors, 1))
        pairs.saved(tmp_path / "summed", *made(), SparseStore())
    forged = Forged.of(tmp_path / "summed")
    forged.metadata["format"] = "1"
    del forged.metadata["sum"]
    forged.save(tmp_path / "before")
    live, _ = guarded(base)
    assert pa_fast.LiveWeights.open(live, base, tmp_path / "before").verify()


@pytest.mark.parametrize("format", ["1", "2"])
@pytest.mark.parametrize(("rel", "kind"), [(0.02, "packed8"), (0.2, "packed16")])
def test_packed_files_of_older_formats_still_open(
    rel: float, kind: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, i = pairs.pair(changed=1.0, rel=rel, shapes={"long": (70_000,)})
    with monkeypatch.context() as patch:
        patch.setattr(pa_kernels, "checksum", lambda tensors, _=1: checksum(tensors, 1))
        forged = Forged.of(pairs.saved(tmp_path / "now", b, i, PackedStore()))
    assert forged.about["long"]["kind"] == kind
    forged.metadata["format"] = format
    if format == "1":
        del forged.metadata["sum"]
    forged.save(tmp_path / "as it is")
    assert "`long`" in refused(tmp_path / "as it is", b)  # codes of today's parity in an old file
    width = int(kind.removeprefix("packed"))
    forged.parts["long::codes"] = of_lower_parity(forged.parts["long::codes"], width)
    parts = {name.partition("::")[2]: part for name, part in forged.parts.items()}
    order = PackedStore.part_names
    forged.about["long"]["data"] = as_hex(
        combine({part: checksum([parts[part]], 1)[0] for part in order})
    )
    forged.save(tmp_path / "before")
    weights, live = pairs.opened(tmp_path / "before", b)
    for lam in (0.3, 1.0, 0.7):
        weights.set_lambda(lam)
        assert weights.verify()
        expected = pa_kernels.reference.lerp(b["long"], i["long"], lam)
        assert bool(pa_kernels.reference.same_bits(live["long"], expected).all())


@pytest.mark.parametrize("size", [0, 5, 100, -100, -1])
def test_a_file_that_is_cut_short_is_refused(
    size: int, good: dict[str, Path], base: pairs.Tensors, tmp_path: Path
) -> None:
    (tmp_path / "cut").write_bytes(good["sparse"].read_bytes()[:size])
    refused(tmp_path / "cut", base)


def test_what_is_no_file_is_refused(base: pairs.Tensors, tmp_path: Path) -> None:
    assert "cannot be opened" in refused(tmp_path / "nothing", base)
    assert "a folder, expected a delta file" in refused(tmp_path, base)


@settings(max_examples=400)
@given(st.data())
def test_a_good_file_with_bytes_changed(data: st.DataObject) -> None:
    content, length = _content()
    changed = bytearray(content)
    places = st.one_of(st.integers(0, length - 1), st.integers(0, len(content) - 1))
    for place, value in data.draw(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)
    ):
        changed[place] = value
    base = made()[0]
    live, untouched = guarded(base)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed"
        path.write_bytes(changed)
        try:
            weights = pa_fast.LiveWeights.open(live, base, path)
        except PaFastError as error:
            assert error.hint
        # what changed was spaces, a version, a number that says the same: the weights are those of
        # the good file
        else:
            weights.set_lambda(1.0)
            assert all(torch.equal(live[name], tensor) for name, tensor in made()[1].items())
        assert untouched()


_kept: list[tuple[bytes, int]] = []


def _content() -> tuple[bytes, int]:
    """A good file, and where its header text ends and only padding follows."""
    if not _kept:
        with tempfile.TemporaryDirectory() as folder:
            content = pairs.saved(Path(folder) / "d", *made(), SparseStore()).read_bytes()
        room = int.from_bytes(content[:8], "little")
        _kept.append((content, 8 + len(content[8 : 8 + room].rstrip(b" "))))
    return _kept[0]
