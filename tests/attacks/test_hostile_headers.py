"""Weight files made to mislead, crash or exhaust a reader: each refused, by class and by name."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import read_header
from pa_fast.errors import CheckpointError


def entry(start: int = 0, stop: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def packed(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = packed({"w": entry()})
ATTACKS = {
    "empty file": (b"", "0 bytes, too short"),
    "length word cut": (GOOD[:5], "5 bytes, too short"),
    "header cut": (
        GOOD[:20],
        "header of 61 bytes overruns the file of 20 bytes, expected at least 69",
    ),
    "truncated data": (GOOD[:-1], "truncated: 76 bytes, expected 77 (tensor `w` ends there)"),
    "trailing data": (GOOD + b"x", "78 bytes, expected 77: 1 bytes belong to no tensor"),
    "huge header length": (
        packed({}, length=2**63 + 5),
        "header length 9223372036854775813, expected at most 100000000",
    ),
    "header length past the end": (
        packed({}, length=1000),
        "header of 1000 bytes overruns the file of 18 bytes",
    ),
    "not JSON": (packed(b"{nope"), "header: not JSON"),
    "not an object": (packed([1]), "header begins with b'[', expected `{`"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "UTF-16": (packed(json.dumps({"w": entry()}).encode("utf-16-le")), "header"),
    "JSON bomb": (
        packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "JSON nested too deep",
    ),
    "object bomb": (packed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "JSON nested too deep"),
    "duplicate tensor": (
        packed(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":1}'),
        "the name `w` appears twice",
    ),
    "duplicate key inside": (
        packed(b'{"w":{"dtype":"F32","dtype":"U8","shape":[]}}'),
        "`dtype` appears twice",
    ),
    "entry not an object": (packed({"w": 5}), "tensor `w`: entry is not an object"),
    "entry lacks a key": (
        packed({"w": {"dtype": "F32", "shape": [2]}}),
        "tensor `w`: entry is not an object",
    ),
    "unknown dtype": (
        packed({"w": entry(dtype="F31")}),
        "tensor `w`: unknown dtype `F31`, expected one of",
    ),
    "dtype not a string": (packed({"w": entry(dtype=["F32"])}), "tensor `w`: unknown dtype"),
    "negative shape": (
        packed({"w": entry(shape=[-2, -1])}),
        "tensor `w`: shape `[-2, -1]`, expected",
    ),
    "huge shape": (
        packed({"w": entry(shape=[2**63])}),
        "tensor `w`: shape `[9223372036854775808]`",
    ),
    "shape that wraps": (
        packed({"w": entry(shape=[2**32, 2**32, 2])}),
        "more elements than any file can hold",
    ),
    "empty but huge shape": (
        packed({"w": entry(0, 0, shape=[0, 2**62, 2**62])}, b""),
        "more elements than any file",
    ),
    "fractional shape": (packed({"w": entry(shape=[2.0])}), "tensor `w`: shape `[2.0]`"),
    "boolean shape": (packed({"w": entry(shape=[True, 2])}), "tensor `w`: shape `[True, 2]`"),
    "too many dimensions": (
        packed({"w": entry(shape=[1] * 33 + [2])}),
        "expected at most 32 sizes",
    ),
    "endless number": (
        packed(b'{"w":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}'),
        "header",
    ),
    "offsets reversed": (
        packed({"w": entry(8, 0)}),
        "tensor `w`: data_offsets `[8, 0]`, expected [start, stop]",
    ),
    "offsets negative": (packed({"w": entry(-8, 0)}), "tensor `w`: data_offsets `[-8, 0]`"),
    "offsets not numbers": (
        packed({"w": {**entry(), "data_offsets": ["0", "8"]}}),
        "tensor `w`: data_offsets",
    ),
    "three offsets": (
        packed({"w": {**entry(), "data_offsets": [0, 4, 8]}}),
        "tensor `w`: data_offsets",
    ),
    "offsets past the end": (
        packed({"w": entry(0, 8000, shape=[2000])}),
        "truncated: 83 bytes, expected 8075",
    ),
    "size is not shape times dtype": (
        packed({"w": entry(shape=[3])}),
        "hold 8 bytes, expected 12 for shape [3] of F32",
    ),
    "half a byte": (
        packed({"w": entry(0, 1, "F4", [1])}, b"x"),
        "hold 1 bytes, expected 0.5 for shape [1] of F4",
    ),
    "overlap": (
        packed({"a": entry(), "b": entry(4, 12)}, bytes(12)),
        "tensor `b`: data starts at byte",
    ),
    "same bytes twice": (packed({"a": entry(), "b": entry()}), "overlaps the tensor before it"),
    "gap": (packed({"a": entry(), "b": entry(12, 20)}, bytes(20)), "leaves a gap before it"),
    "gap at the start": (packed({"a": entry(4, 12)}, bytes(12)), "leaves a gap before it"),
    "metadata not strings": (
        packed({"__metadata__": {"a": 1}, "w": entry()}),
        "`__metadata__` is not an object of strings",
    ),
    "metadata not an object": (
        packed({"__metadata__": "pt", "w": entry()}),
        "`__metadata__` is not an object of strings",
    ),
    "terminal codes in a name": (
        packed({"\x1b[2J": entry()}),
        r"tensor `\x1b[2J`: the name has characters",
    ),
    "lone surrogate in a name": (
        packed(b'{"\\ud800": 1}'),
        r"tensor `\ud800`: the name has characters",
    ),
    "endless name": (packed({"n" * 100_000: 1}), "..."),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused(tmp_path: Path, attack: str) -> None:
    data, expected = ATTACKS[attack]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    assert str(file) in error.value.message and expected in error.value.message
    assert error.value.hint and len(error.value.message) < 1000


def test_the_good_file_that_the_attacks_start_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert read_header(tmp_path / "model.safetensors").tensors["w"].nbytes == 8


@pytest.mark.parametrize(
    "header",
    [
        b'  \n{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        {"__metadata__": None, "w": entry()},
        {"w": {**entry(), "note": [1, {"more": None}]}},
        {"__metadata__": {"format": "pt"}, "w": entry()},
    ],
    ids=["leading white space", "metadata null", "keys of others", "metadata"],
)
def test_what_safetensors_opens_is_opened(tmp_path: Path, header: Any) -> None:
    from safetensors import safe_open

    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(header))
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["w"]
    assert list(read_header(path).tensors) == ["w"]


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


def read_or_refuse(data: bytes) -> None:
    """The reader's whole promise on arbitrary bytes: CheckpointError, or tensors that lie inside
    the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(data)
        try:
            found = read_header(file)
        except CheckpointError:
            return
        assert sum(info.nbytes for info in found.tensors.values()) + 8 + int.from_bytes(
            data[:8], "little"
        ) == len(data)
        assert all(8 < info.start <= info.stop <= len(data) for info in found.tensors.values())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 9)) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    read_or_refuse(data)


@settings(max_examples=300)
@given(
    st.dictionaries(st.text(max_size=8), entries | json_values, max_size=3), st.binary(max_size=40)
)
def test_any_header(header: dict[str, Any], data: bytes) -> None:
    read_or_refuse(packed(header, data))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_a_good_file_with_bytes_changed(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    read_or_refuse(bytes(data))
