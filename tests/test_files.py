"""File systems without locks or without fsync of folders: everything runs with a note, and nothing
that is finished goes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pa_fast import files
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.verify import verify
from pa_fast.checkpoint.writer import OutputFolder
from pa_fast.errors import OutputError
from pa_fast.stores import file as delta_file
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.sparse import SparseStore
from pa_fast.sweep import sweep
from tests.checkpoint.pairs import write_pair
from tests.stores import pairs as deltas
from tests.sweep.fakes import FakeEngine, Scorer


@pytest.fixture(autouse=True)
def notes_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_noted", set())


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def without_folder_sync(code: int, only: Path | None = None) -> Callable[[int], None]:
    """`os.fsync` that fails with `code` for folders, or for the folder `only`."""
    sync = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) and (
            only is None or os.path.samestat(os.fstat(fd), os.stat(only))
        ):
            raise OSError(code, os.strerror(code))
        sync(fd)

    return fsync


def everything(root: Path) -> None:
    """Each way to write, twice, so that the second replaces or goes on from the first."""
    pair = write_pair(root)
    for lam in ("0.25", "0.5"):
        merge(*pair, lam, root / "out", overwrite=True)
        assert verify(root / "out", *pair).lam == lam
        delta_file.write(
            root / "delta",
            deltas.sources(*deltas.pair(shapes={"a": (8, 8)})),
            SparseStore(),
            overwrite=True,
        )
        DeltaFile.open(root / "delta").close()
        for options in ({}, {"shard": (0, 2)}, {"shard": (1, 2)}):
            found = sweep(
                FakeEngine(),
                "0,1",
                [Scorer("icl")],
                root / f"run{len(options)}",
                figure=False,
                **options,
            )
        assert len(found.rows) == 2
    assert {path.name for path in root.iterdir()} == {
        "base",
        "instruct",
        "out",
        "delta",
        "run0",
        "run1",
    }


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    everything(tmp_path)
    (said,) = (record.getMessage() for record in logged)
    assert "has no locks" in said and os.strerror(code) in said and "run one at a time" in said


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_fsync_of_folders(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(os, "fsync", without_folder_sync(code))
    everything(tmp_path)
    (said,) = (record.getMessage() for record in logged)
    assert "cannot sync folders" in said and "power cut" in said


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_finished_merge_whose_last_sync_fails_stays(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    pair = write_pair(tmp_path / "pair")
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "out"
    merge(*pair, 0.25, out)
    monkeypatch.setattr(os, "fsync", without_folder_sync(code, only=out.parent))
    merge(*pair, 0.5, out, overwrite=True)
    assert verify(out, *pair).lam == "0.5" and "cannot be synced" in "".join(
        record.getMessage() for record in logged
    )
    monkeypatch.undo()
    merge(*pair, 0.75, out, overwrite=True)
    assert verify(out, *pair).lam == "0.75" and [path.name for path in out.parent.iterdir()] == [
        "out"
    ]


def test_a_finished_delta_whose_last_sync_fails_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(os, "fsync", without_folder_sync(errno.EIO))
    delta_file.write(
        tmp_path / "delta", deltas.sources(*deltas.pair(shapes={"a": (8, 8)})), SparseStore()
    )
    DeltaFile.open(tmp_path / "delta").close()
    assert "cannot be synced" in logged[-1].getMessage()


def test_weight_files_that_are_complete_stay_where_the_folder_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, shards=(3, 1))
    monkeypatch.setattr(os, "fsync", without_folder_sync(errno.EIO))
    with pytest.raises(OutputError, match="cannot be written"):
        merge(*pair, 0.5, tmp_path / "out")
    monkeypatch.undo()
    assert merge(*pair, 0.5, tmp_path / "out").resumed == 3
    assert verify(tmp_path / "out", *pair).ok


def test_a_rename_that_was_done_though_an_error_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, rename = write_pair(tmp_path), os.rename
    merge(*pair, 0.25, tmp_path / "out")

    def twice(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", twice)
    merge(*pair, 0.5, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", *pair).lam == "0.5"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "instruct", "out"}


def test_an_interrupt_between_the_renames_of_an_overwrite_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, rename = write_pair(tmp_path), os.rename
    merge(*pair, 0.25, tmp_path / "out")

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name == ".out.pa_fast.partial":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(*pair, 0.5, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", *pair).lam == "0.25"


def test_without_locks_the_process_that_came_last_is_the_one_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with (
        pytest.raises(OutputError, match="another process began to write it"),
        OutputFolder(tmp_path / "out", 0) as first,
    ):
        second = OutputFolder(tmp_path / "out", 0).__enter__()
        second.write("config.json", b"{}")
        first.commit()
    assert (second.path / "config.json").exists(), (
        "the first must leave alone what is the second's now"
    )
    second.commit()
    second.__exit__(None, None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and (
        tmp_path / "out" / "config.json"
    ).exists()
