"""Checkpoints as they are read, against the safetensors library."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save

from pa_fast.checkpoint import safetensors
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import CheckpointError, DataError
from tests.checkpoint.pairs import CONFIG, load_folder, random_tensors, same_bits, write_checkpoint

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint16,
    torch.complex64,
]
shapes = st.lists(st.integers(0, 5), max_size=4)
names = st.text(st.characters(blacklist_categories=("C", "Z")), min_size=1, max_size=20).map(
    lambda name: f"{name}.w"
)


@settings(max_examples=60)
@given(
    st.dictionaries(
        names,
        st.tuples(st.sampled_from(DTYPES), shapes, st.integers(0, 2**31)),
        min_size=1,
        max_size=6,
    )
)
def test_every_tensor_comes_back_bit_for_bit(
    drawn: dict[str, tuple[torch.dtype, list[int], int]],
) -> None:
    tensors = {}
    for name, (dtype, shape, seed) in drawn.items():
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
        tensors[name] = values.to(dtype)
    with tempfile.TemporaryDirectory() as root:
        folder = write_checkpoint(Path(root) / "c", tensors)
        with Checkpoint.open(folder) as found:
            assert set(found.tensors) == set(tensors)
            for name, tensor in tensors.items():
                assert same_bits(found.tensor(name), tensor)
                assert found.tensors[name].nbytes == tensor.nbytes


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    with Checkpoint.open(write_checkpoint(tmp_path / "c", tensors, shards=3)) as found:
        assert len({info.file for info in found.tensors.values()}) == 3
        assert all(same_bits(found.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_chunk_is_read_into_the_memory_that_is_given(tmp_path: Path) -> None:
    with Checkpoint.open(write_checkpoint(tmp_path / "c", random_tensors(torch.bfloat16))) as found:
        whole = found.tensor("a.odd").reshape(-1)
        out = torch.empty(4, dtype=torch.bfloat16)
        part = found.chunk("a.odd", 5, 9, out)
        assert (
            part is out
            and torch.equal(part, whole[5:9])
            and torch.equal(found.chunk("a.odd", 5, 9), part)
        )


def test_misaligned_data_are_copied_to_an_aligned_place(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(50)}
    folder = write_checkpoint(tmp_path / "c", tensors)
    header = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    header["b"] = {"dtype": "F32", "shape": [50], "data_offsets": [3, 203]}
    text = json.dumps(header).encode()
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with Checkpoint.open(folder) as found:
        assert found.tensors["b"].start % 4, (
            "the data should be misaligned for this test to mean anything"
        )
        read = found.tensor("b")
        assert read.data_ptr() % 4 == 0
        assert same_bits(read, tensors["b"])


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    tensors = random_tensors(torch.float32)
    with Checkpoint.open(write_checkpoint(tmp_path / "c", tensors)) as found:
        view = found.tensor("a.odd")
    del found
    assert same_bits(view, tensors["a.odd"])


def test_a_file_that_shrinks_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", {"a": torch.randn(100_000), "b": torch.randn(4)})
    with Checkpoint.open(folder) as found:
        found.tensor("b")
        os.truncate(folder / "model.safetensors", 5000)
        with pytest.raises(
            DataError, match=r"model.safetensors: the file changed .* 5000 bytes, expected"
        ):
            found.tensor("a")


def test_bytes_that_are_gone_are_refused_before_they_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(safetensors.MADV_POPULATE_READ)
    except OSError:
        pytest.skip("needs a kernel with MADV_POPULATE_READ")
    folder = write_checkpoint(tmp_path / "c", {"a": torch.randn(100_000)})
    with Checkpoint.open(folder) as found:
        found.tensor("a")
        monkeypatch.setattr(
            safetensors.WeightFile, "check", lambda self: os.truncate(self.path, 5000)
        )
        with pytest.raises(DataError, match=r"model.safetensors: bytes \d+ to \d+ cannot be read"):
            found.tensor("a")


def test_reading_a_file_that_shrinks_or_fails_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "c", {"a": torch.randn(100_000)})
    with Checkpoint.open(folder) as found:
        os.truncate(folder / "model.safetensors", 5000)
        with pytest.raises(
            DataError, match=r"model.safetensors: the file changed .* 5000 bytes, expected"
        ):
            found.chunk("a", 0, 100_000)

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(
            DataError, match=r"model.safetensors: bytes from \d+ cannot be read: Input/output error"
        ):
            found.chunk("a", 0, 100_000)
        with pytest.raises(DataError, match="cannot be read"):
            found.quick_fingerprint()


def test_a_file_that_is_written_to_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", random_tensors(torch.bfloat16))
    with Checkpoint.open(folder) as found:
        found.tensor("a.odd")
        os.utime(folder / "model.safetensors", ns=(1, 1))
        with pytest.raises(DataError, match="changed"):
            found.check_unchanged("a.odd")


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    folder = write_checkpoint(tmp_path / "c", tensors)
    with Checkpoint.open(folder) as found:
        (folder / "new").write_bytes(save({"a.odd": torch.zeros(1)}))
        os.replace(folder / "new", folder / "model.safetensors")
        assert same_bits(found.tensor("a.odd"), tensors["a.odd"])


def test_quick_fingerprint_does_not_depend_on_shards(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    one = Checkpoint.open(write_checkpoint(tmp_path / "one", tensors)).quick_fingerprint()
    three = Checkpoint.open(
        write_checkpoint(tmp_path / "three", tensors, shards=3)
    ).quick_fingerprint()
    assert one == three and len(one) == 16 and int(one, 16) >= 0


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_quick_fingerprint_sees_every_kind_of_change(tmp_path: Path, change: str) -> None:
    tensors = random_tensors(torch.bfloat16)
    before = Checkpoint.open(write_checkpoint(tmp_path / "before", tensors)).quick_fingerprint()
    odd = tensors.pop("a.odd")
    if change == "value":
        odd = odd + 1
    tensors["a.even" if change == "name" else "a.odd"] = odd
    if change == "dtype":
        tensors["a.odd"] = odd.view(torch.float16)
    if change == "shape":
        tensors["a.odd"] = odd.reshape(-1)
    assert (
        Checkpoint.open(write_checkpoint(tmp_path / "after", tensors)).quick_fingerprint() != before
    )


def test_a_hub_cache_of_links_is_read(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    stored = write_checkpoint(tmp_path / "blobs", tensors)
    snapshot = tmp_path / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    for path in stored.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    with Checkpoint.open(snapshot) as found:
        assert same_bits(found.tensor("a.odd"), load_folder(stored)["a.odd"])


def test_opening_loads_no_torch(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", random_tensors(torch.bfloat16), shards=2)
    code = (
        "import sys; from pa_fast.checkpoint.reader import Checkpoint;"
        f"Checkpoint.open({str(folder)!r}).quick_fingerprint(); print('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "False", done.stderr


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "nothing")


def test_config_is_kept(tmp_path: Path) -> None:
    assert (
        Checkpoint.open(write_checkpoint(tmp_path / "c", random_tensors(torch.bfloat16))).config
        == CONFIG
    )
