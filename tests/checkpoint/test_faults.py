"""Disks that fail while a merge runs: one message that names the file, nothing left behind, and the
next run completes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.verify import verify
from pa_fast.errors import DataError, OutputError, PaFastError
from tests.checkpoint.pairs import write_checkpoint, write_pair


def failing(function: Callable[..., Any], at: int, code: int) -> Callable[..., Any]:
    """`function`, which fails with `code` from call number `at` on."""
    count = 0

    def failed(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return failed


@pytest.mark.parametrize(
    ("call", "at", "code", "error", "match"),
    [
        (
            "preadv",
            1,
            errno.EIO,
            DataError,
            r"model.*safetensors: bytes from \d+ cannot be read: Input/output error",
        ),
        (
            "preadv",
            9,
            errno.EIO,
            DataError,
            r"model.*safetensors: bytes from \d+ cannot be read: Input/output error",
        ),
        (
            "pwrite",
            1,
            errno.ENOSPC,
            OutputError,
            r"cannot be written: No space left on device \(.* free\)",
        ),
        ("pwrite", 5, errno.EIO, OutputError, r"cannot be written: Input/output error"),
        ("posix_fallocate", 2, errno.ENOSPC, OutputError, "No space left"),
        ("fsync", 1, errno.EIO, OutputError, "Input/output error"),
        ("fsync", 4, errno.EIO, OutputError, "Input/output error"),
        ("rename", 2, errno.EIO, OutputError, "Input/output error"),
    ],
)
def test_a_disk_that_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    at: int,
    code: int,
    error: type[PaFastError],
    match: str,
) -> None:
    pair = write_pair(tmp_path, shards=(3, 2))
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing(getattr(os, call), at, code))
        with pytest.raises(error, match=match):
            merge(*pair, 0.3, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "instruct"]
    merge(*pair, 0.3, tmp_path / "out")
    assert verify(tmp_path / "out", *pair).ok


def test_short_reads_and_writes_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path)
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(
        os,
        "preadv",
        lambda fd, buffers, at: preadv(fd, [buffers[0][: max(len(buffers[0]) // 2, 1)]], at),
    )
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(len(data) // 3, 1)], at)
    )
    merge(*pair, 0.3, tmp_path / "out")
    monkeypatch.undo()
    assert verify(tmp_path / "out", *pair).ok


@pytest.mark.parametrize("side", [0, 1])
def test_a_source_that_shrinks_meanwhile(tmp_path: Path, side: int) -> None:
    tensors = {f"w{n}": torch.randn(100_000) for n in range(4)}
    pair = (
        write_checkpoint(tmp_path / "base", tensors, shards=4),
        write_checkpoint(tmp_path / "instruct", tensors, shards=2),
    )
    last = sorted(pair[side].glob("*.safetensors"))[-1]
    kept = last.read_bytes()

    def shrink(done: int, total: int) -> None:
        os.truncate(last, 1000)

    with pytest.raises(
        DataError, match=rf"{last.name}: the file changed while it was read: 1000 bytes, expected"
    ):
        merge(*pair, 0.3, tmp_path / "out", progress=shrink)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "instruct"]
    last.write_bytes(kept)
    merge(*pair, 0.3, tmp_path / "out")
    assert verify(tmp_path / "out", *pair).ok


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_and_is_enlarged(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"w{n}": torch.randn(40_000) for n in range(3)}
    pair = (
        write_checkpoint(tmp_path / "base", tensors, shards=3),
        write_checkpoint(tmp_path / "instruct", tensors),
    )
    with pytest.raises(OutputError, match=r"needs .* are free on its disk"):
        merge(*pair, 0.5, small / "out")
    # as if others took the space since
    monkeypatch.setattr("pa_fast.checkpoint.writer._SPARE_BYTES", -(10**9))
    with pytest.raises(OutputError, match=r"No space left on device \(.* free\)"):
        merge(*pair, 0.5, small / "out")
    assert list(small.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
    merge(*pair, 0.5, small / "out")
    assert verify(small / "out", *pair).ok


def test_a_read_only_disk(tmp_path: Path, small: Path) -> None:
    pair = write_pair(tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(OutputError, match="cannot be written: Read-only file system"):
        merge(*pair, 0.5, small / "out")
    subprocess.run(["mount", "-o", "remount,rw,size=100m", str(small)], check=True)
    merge(*pair, 0.5, small / "out")
    assert verify(small / "out", *pair).ok
