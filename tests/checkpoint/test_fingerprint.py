"""The content fingerprint, against the checksum of whole tensors."""

from __future__ import annotations

import json
import pathlib

import pa_kernels
import pytest
import torch
from pa_kernels.checksum import CHUNK_BYTES, piece_checksum
from pa_kernels.reference import CHECKSUM_VERSION, CHUNK_WORDS

import pa_fast
from pa_fast.checkpoint import provenance
from pa_fast.checkpoint.provenance import combine, name_hash
from tests.engines.architectures import write_pair


def test_chunk_size_is_the_kernels() -> None:
    assert CHUNK_BYTES == 8 * CHUNK_WORDS


@pytest.mark.parametrize(
    "count", [0, 1, 7, 8, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 13]
)
def test_pieces_sum_to_the_checksum_of_the_whole(count: int) -> None:
    data = torch.randint(0, 256, (count,), dtype=torch.uint8)
    for step in (CHUNK_BYTES, 2 * CHUNK_BYTES):
        total = sum(
            piece_checksum(data[at : at + step], at // CHUNK_BYTES) for at in range(0, count, step)
        )
        assert (
            total % 2**64 == pa_kernels.checksum([data])[0] == pa_kernels.reference.checksum(data)
        )


def test_every_dtype_is_summed_by_its_bytes() -> None:
    data = torch.randn(100_003).bfloat16()
    assert piece_checksum(data, 0) == pa_kernels.checksum([data])[0]


def test_name_hashes_are_odd_and_of_64_bits() -> None:
    hashes = {name_hash(f"model.layers.{n}.weight") for n in range(1000)}
    assert len(hashes) == 1000 and all(value % 2 and 0 < value < 2**64 for value in hashes)
    printed_by_b2sum = "40f89e395b66422f"
    assert name_hash("a") == int.from_bytes(bytes.fromhex(printed_by_b2sum), "little") | 1


def test_combine_ignores_order_and_tells_names_apart() -> None:
    assert (
        combine({"a": 3, "b": 5})
        == combine({"b": 5, "a": 3})
        == (3 * name_hash("a") + 5 * name_hash("b")) % 2**64
    )
    assert combine({"a": 3, "b": 5}) != combine({"a": 5, "b": 3})


def test_pa_fast_json_says_the_version_of_its_fingerprints(tmp_path: pathlib.Path) -> None:
    assert provenance.CHECKSUM_VERSION == CHECKSUM_VERSION
    base, instruct = write_pair(tmp_path, "llama")
    pa_fast.merge(base, instruct, 0.5, tmp_path / "merged")
    recorded = tmp_path / "merged" / "pa_fast.json"
    document = json.loads(recorded.read_text())
    assert document["checksum"] == CHECKSUM_VERSION
    # a merge of an earlier version still verifies
    del document["checksum"]
    recorded.write_text(json.dumps(document))
    assert pa_fast.verify(tmp_path / "merged", base, instruct).ok
