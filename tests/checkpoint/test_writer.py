"""Output folders: whole or not at all, one writer at a time, nothing lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.verify import verify
from pa_fast.checkpoint.writer import OutputFolder
from pa_fast.errors import OutputError
from tests import patience, programs
from tests.checkpoint.pairs import write_pair


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(OutputError, match=r"out: not empty: found thesis.tex") as error:
        merge(*pair, 0.5, tmp_path / "out")
    assert "--overwrite" in str(error.value.hint)
    with pytest.raises(OutputError, match="which is no checkpoint"):
        merge(*pair, 0.5, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "irreplaceable"
    assert names(tmp_path) == ["base", "instruct", "out"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / "out").mkdir()
    merge(*pair, 0.5, tmp_path / "out")
    merge(*pair, 0.5, tmp_path / "deep" / "er" / "out")
    assert verify(tmp_path / "out", *pair).ok and verify(tmp_path / "deep" / "er" / "out", *pair).ok


def test_a_file_as_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="found a file"):
        merge(*write_pair(tmp_path), 0.5, tmp_path / "out", overwrite=True)


def test_overwrite_replaces_a_merge(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge(*pair, 0.5, tmp_path / "out")
    merge(*pair, 0.75, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", *pair).lam == "0.75"
    assert names(tmp_path) == ["base", "instruct", "out"]


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge(*pair, 0.5, tmp_path / "out")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*pair, 0.75, tmp_path / "out", overwrite=True, progress=stop)
    assert verify(tmp_path / "out", *pair).lam == "0.5"
    assert names(tmp_path) == ["base", "instruct", "out"]


def test_a_target_behind_a_link_is_the_folder_itself(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    merge(*pair, 0.5, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and verify(tmp_path / "disk" / "out", *pair).ok


def test_a_run_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge(*pair, 0.5, tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.pa_fast.old")
    with pytest.raises(OutputError, match="not empty"):
        merge(*pair, 0.75, tmp_path / "out")
    assert verify(tmp_path / "out", *pair).lam == "0.5"


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / ".out.pa_fast.partial").mkdir()
    (tmp_path / ".out.pa_fast.partial" / "model.safetensors.partial").write_text("half")
    (tmp_path / ".out.pa_fast.lock").write_text("")
    merge(*pair, 0.5, tmp_path / "out")
    assert names(tmp_path) == ["base", "instruct", "out"]


def test_two_writers_into_one_target(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    with OutputFolder(tmp_path / "out", 0) as first:
        first.write("config.json", b"{}")
        with pytest.raises(OutputError, match="another process is writing it"):
            merge(*pair, 0.5, tmp_path / "out")
        assert names(first.path) == [
            ".pa_fast.shards.jsonl",
            "config.json",
        ], "the second must not touch the first one's files"
    merge(*pair, 0.5, tmp_path / "out")


def test_racing_processes_give_one_whole_merge(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pair, work = write_pair(tmp_path), tmp_path_factory.mktemp("work")
    runs = [
        programs.Program(merge, *pair, lam, tmp_path / "out", folder=work)
        for lam in ("0.25", "0.5", "0.75")
    ]
    errors = [patience.communicate(run)[1] for run in runs]
    assert [run.returncode for run in runs].count(0) == 1, errors
    assert all("OutputError" in error for run, error in zip(runs, errors) if run.returncode)
    assert verify(tmp_path / "out", *pair).ok
    assert names(tmp_path) == ["base", "instruct", "out"]


def test_too_little_disk_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(OutputError, match=r"needs 67\.\d MB, 1 kB are free"):
        merge(*pair, 0.5, tmp_path / "out")
    assert names(tmp_path) == ["base", "instruct"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: "):
        merge(*pair, 0.5, tmp_path / "file" / "out")
