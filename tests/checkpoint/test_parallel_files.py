"""Files filled side by side: the same folder, the first failure alone, and nothing that goes on
behind it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pa_fast.checkpoint import merge as merging
from pa_fast.checkpoint.merge import merge, parallel_files
from pa_fast.checkpoint.verify import verify
from pa_fast.errors import DataError
from tests.checkpoint.pairs import random_tensors, write_checkpoint, write_pair
from tests.checkpoint.test_resume import contents, interrupted


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large files are merged on three cores."""
    monkeypatch.setattr(merging, "_LARGE_BYTES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def test_a_merge_side_by_side_is_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path, shards=(5, 2))
    alone = merge(*pair, 0.3, tmp_path / "alone")
    monkeypatch.setattr(merging, "_LARGE_BYTES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen: list[tuple[int, int]] = []
    report = merge(*pair, 0.3, tmp_path / "out", progress=lambda *at: seen.append(at))
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "alone")
    assert ours.pop("README.md") != theirs.pop("README.md"), "the card names the folder"
    assert ours == theirs
    assert (report.base_fingerprint, report.instruct_fingerprint) == (
        alone.base_fingerprint,
        alone.instruct_fingerprint,
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_an_interrupt_leaves_complete_files_and_the_next_run_goes_on(
    tmp_path: Path, at_once: None
) -> None:
    tensors = random_tensors(torch.bfloat16) | {
        f"layer.{n}": torch.randn(1 << 20).bfloat16() for n in range(5)
    }
    pair = (
        write_checkpoint(tmp_path / "base", tensors, shards=6),
        write_checkpoint(tmp_path / "instruct", tensors),
    )
    with pytest.raises(KeyboardInterrupt):
        merge(*pair, 0.3, tmp_path / "out", progress=interrupted(9_000_000))
    assert not (tmp_path / "out").exists()
    assert merge(*pair, 0.3, tmp_path / "out").resumed > 0
    assert verify(tmp_path / "out", *pair).ok


def test_a_fault_in_one_file_ends_all_and_leaves_nothing(tmp_path: Path, at_once: None) -> None:
    base, instruct = random_tensors(torch.bfloat16), random_tensors(torch.bfloat16, 1)
    name = sorted(instruct)[-1]
    instruct[name].view(-1)[1] = float("nan")
    write_checkpoint(tmp_path / "base", base, shards=4)
    write_checkpoint(tmp_path / "instruct", instruct)
    with pytest.raises(DataError, match="non-finite"):
        merge(tmp_path / "base", tmp_path / "instruct", 0.3, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "base",
        "instruct",
    ]


def test_results_are_in_order_and_no_more_than_asked_run_at_once() -> None:
    running, most, turn = set[int](), [0], threading.Lock()
    meet = threading.Barrier(2, timeout=60)

    def work(pool: ThreadPoolExecutor, item: int) -> int:
        with turn:
            running.add(item)
            most[0] = max(most[0], len(running))
        meet.wait()
        with turn:
            running.discard(item)
        return pool.submit(lambda: item * item).result()

    assert parallel_files(work, range(8), 2, threading.Event()) == [k * k for k in range(8)]
    assert most == [2]


def test_the_first_failure_is_the_one_that_is_told() -> None:
    ended = threading.Event()

    def work(pool: ThreadPoolExecutor, item: int) -> int:
        if item == 3:
            raise ValueError("of its own")
        if not ended.wait(60 if item > 0 else 0) and item > 0:
            raise AssertionError("nobody said that it has ended")
        if ended.is_set():
            raise RuntimeError("because of another")
        return item

    with pytest.raises(ValueError, match="of its own"):
        parallel_files(work, [0, 1, 3, 4], 2, ended)
