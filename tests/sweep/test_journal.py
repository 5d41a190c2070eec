"""The journal: durable lines, torn tails, damage, locks and interrupts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast import files
from pa_fast.base import Item, Lambda
from pa_fast.errors import OutputError, RunError
from pa_fast.sweep import journal
from pa_fast.sweep.entry import JournalEntry, Shard, parse
from pa_fast.sweep.journal import Journal

DONE = JournalEntry(
    "0.3",
    "icl",
    score=0.5,
    unit="accuracy",
    n=2,
    checksum=2**64 - 1,
    effective_lambda=0.31,
    switch_s=0.1,
    eval_s=2.0,
    host="h",
)
RUN = json.dumps({"format": 1, "lambdas": [], "evaluators": [], "engine": {}})
FAILED = JournalEntry(
    "0.3", "icl", error="ValueError: no\nsecond line \ud800", traceback="Traceback", host="h"
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=20)
shown = texts.filter(str.isprintable)  # what stands in tables and files
entries = st.builds(
    JournalEntry,
    lam=st.fractions(min_value=-3, max_value=3, max_denominator=1000).map(
        lambda exact: Lambda(exact).key
    ),
    evaluator=shown.filter(bool),
    score=numbers,
    unit=shown,
    n=st.integers(1, 2**40),
    items=st.none() | texts,
    error=st.none() | texts,
    traceback=st.none() | texts,
    checksum=st.none() | st.integers(0, 2**64 - 1),
    effective_lambda=st.none() | numbers,
    intended_lambda=st.none() | numbers,
    switch_s=st.none() | numbers,
    eval_s=st.none() | numbers,
    host=st.none() | texts,
    restored=st.none() | st.lists(texts, max_size=3).map(tuple),
)


@given(entries)
def test_an_entry_is_read_back_as_it_was_written(entry: JournalEntry) -> None:
    line = entry.line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert parse(line) == entry


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda leaf: (
            st.lists(leaf)
            | st.dictionaries(
                st.sampled_from(["lambda", "evaluator", "score", "unit", "n", "checksum", "error"]),
                leaf,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_anything_else_is_a_value_error(line: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse(line), JournalEntry)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lambda": "0.30"}, "not the key of a λ"),
        ({"lambda": 0.3}, "not the key of a λ"),
        ({"lambda": "1e999999999"}, "not the key of a λ"),
        ({"evaluator": ""}, "`evaluator`"),
        ({"score": None}, "neither a score"),
        ({"score": float("nan")}, "`score`"),
        ({"score": 10**400}, "`score`"),
        ({"score": "0.5"}, "`score`"),
        ({"n": 0}, "`n`"),
        ({"n": True}, "`n`"),
        ({"checksum": 12}, "`checksum`"),
        ({"checksum": "0xff"}, "`checksum`"),
        ({"unit": 3}, "`unit`"),
        ({"restored": "autocast"}, "`restored`"),
        ({"restored": [3]}, "`restored`"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], why: str) -> None:
    fields = {**json.loads(DONE.line()), **change}
    with pytest.raises(ValueError, match=why):
        parse(json.dumps(fields).encode())


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert parse(json.dumps({**json.loads(DONE.line()), "watts": 3}).encode()) == DONE


def fill(folder: Path, *more: JournalEntry) -> bytes:
    (folder / "run.json").write_text(RUN)
    with Journal(folder) as book:
        for entry in more:
            book.record(entry)
    return (folder / journal.NAME).read_bytes()


def test_finished_points_are_known_and_failed_ones_are_not(tmp_path: Path) -> None:
    fill(tmp_path, FAILED, replace(DONE, lam="0.5"))
    with Journal(tmp_path) as book:
        assert book.finished("0.3", "icl") is None
        assert book.finished("0.5", "icl") == replace(DONE, lam="0.5")
        assert book.finished("0.5", "other") is None
        assert book.checksum("0.5") == 2**64 - 1
        assert book.checksum("0.3") is None
        book.record(DONE)
        assert book.finished("0.3", "icl") == DONE


@settings(max_examples=60)
@given(st.lists(entries, min_size=1, max_size=4), st.data())
def test_a_torn_last_line_is_cut_off_and_the_next_one_stands_alone(
    written: list[JournalEntry], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = fill(folder, *written)
        last = len(whole) - len(whole.splitlines(keepends=True)[-1])
        cut = data.draw(st.integers(last, len(whole) - 1))
        tail = data.draw(st.just(b"") | st.just(b"\0" * 9) | st.just(b"\0\0\n"))
        (folder / journal.NAME).write_bytes(whole[:cut] + tail)
        assert journal.read(folder) == written[:-1]
        with Journal(folder) as book:
            book.record(DONE)
        assert journal.read(folder) == [*written[:-1], DONE]
        assert (folder / journal.NAME).read_bytes() == whole[:last] + DONE.line()


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"", b"[]", b"null", b'{"lambda": "0.3"}', b"[" * 100_000]
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    lines = [DONE.line(), damage + b"\n", replace(DONE, lam="0.4").line()]
    fill(tmp_path)
    (tmp_path / journal.NAME).write_bytes(b"".join(lines))
    for read in (lambda: journal.read(tmp_path), lambda: Journal(tmp_path).__enter__()):
        with pytest.raises(RunError, match=r"line 2 of .*journal\.jsonl is damaged: it ") as caught:
            read()
        assert caught.value.hint
    assert (tmp_path / journal.NAME).read_bytes() == b"".join(lines)


def test_overwrite_reads_no_damaged_line_and_removes_only_what_a_sweep_wrote(
    tmp_path: Path,
) -> None:
    fill(tmp_path, DONE)
    (tmp_path / journal.NAME).write_bytes(b"{\n{\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "items" / "mine.txt").write_text("mine")
    (tmp_path / "items" / "lambda=0.3.icl.jsonl").write_text("{}")
    (tmp_path / "results.csv").write_text("old")
    with Journal(tmp_path, overwrite=True) as book:
        assert book.finished("0.3", "icl") is None
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"journal.jsonl", ".lock", "notes.txt", "items", "items/mine.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"`thesis\.tex` and no run\.json"):
        Journal(tmp_path, overwrite=overwrite).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_leaves_before_run_json_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / journal.NAME).touch()
    (tmp_path / ".run.json.123.tmp").write_text("{")
    with Journal(tmp_path):
        assert not (tmp_path / ".run.json.123.tmp").exists()


def test_a_journal_without_run_json_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, DONE)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"no run\.json"):
        Journal(tmp_path).__enter__()


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_sweeps_on_one_folder_are_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "run.json").write_text(RUN)
    with Journal(tmp_path) as book:
        book.record(DONE)
        with pytest.raises(RunError, match="in use by another sweep"):
            Journal(tmp_path, overwrite=overwrite).__enter__()
        assert journal.read(tmp_path) == [DONE]
    with Journal(tmp_path):
        pass


def test_a_file_in_place_of_the_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OutputError, match="cannot be used as a run folder"):
        Journal(tmp_path / "run").__enter__()


def test_items_are_there_before_the_line_and_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    items = [Item("q1", "task", 0.1), Item("q2", "täsk", 1.0)]
    names = ["icl", "ICL", "a/b", "a_b", "..", "x" * 300, "λ", "-"]
    with Journal(tmp_path) as book:
        append = book._append

        def checked(line: bytes) -> None:
            assert (tmp_path / json.loads(line)["items"]).exists()
            append(line)

        monkeypatch.setattr(book, "_append", checked)
        files = [
            book.record(replace(DONE, evaluator=name, lam=lam), items).items
            for name in names
            for lam in ("0.3", "1/3")
        ]
    assert len({str(file).lower() for file in files}) == len(files)
    assert "items/lambda=0.3.icl.jsonl" in files
    for file in files:
        path = tmp_path / str(file)
        assert path.parent == tmp_path / "items"
        assert [Item(**json.loads(line)) for line in path.read_text().splitlines()] == items


def test_an_interrupt_waits_for_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    write = os.write

    def interrupted(handle: int, data: bytes) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return write(handle, data[:7])  # a short write, as an interrupted one may be

    with Journal(tmp_path) as book:
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            book.record(DONE, [Item("q", "g", 1.0)])
        monkeypatch.undo()
        assert book.finished("0.3", "icl") is not None
    assert journal.read(tmp_path) == [replace(DONE, items="items/lambda=0.3.icl.jsonl")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, DONE)
    write = os.write
    calls = []

    def full(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(handle, data[:7])

    with Journal(tmp_path) as book:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left on device"):
            book.record(replace(DONE, lam="0.4"))
        monkeypatch.undo()
        assert (tmp_path / journal.NAME).read_bytes() == DONE.line()
        book.record(replace(DONE, lam="0.5"))
    assert [entry.lam for entry in journal.read(tmp_path)] == ["0.3", "0.5"]


def test_a_failed_write_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    files.write(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"results\.csv cannot be written: No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_check_folder_refuses_what_entering_would_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    for name, kind, why in (
        ("file", OutputError, "is a file|Not a directory"),
        ("file/run", OutputError, "is a file|Not a directory"),
        ("foreign", RunError, "no run.json"),
    ):
        for refuse in (journal.check_folder, lambda folder: Journal(folder).__enter__()):
            with pytest.raises(kind, match=why):
                refuse(tmp_path / name)
    journal.check_folder(tmp_path / "a" / "new" / "one")
    assert sorted(tmp_path.rglob("*")) == before
    with Journal(tmp_path / "run"), pytest.raises(RunError, match="in use by another sweep"):
        journal.check_folder(tmp_path / "run")
    journal.check_folder(tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="may not be written"):
        journal.check_folder(tmp_path / "run" / "below")


def test_a_run_that_begins_while_its_folder_is_checked_is_not_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir

    def begun(folder: Path) -> list[Path]:
        if folder == tmp_path and not (tmp_path / "run.json").exists():
            (tmp_path / "journal.1-of-2.jsonl").write_bytes(DONE.line())
            (tmp_path / "run.json").write_text(RUN)
        return list(listed(folder))

    monkeypatch.setattr(Path, "iterdir", begun)
    with Journal(tmp_path, shard=Shard(0, 2)) as book:
        assert book.finished("0.3", "icl") == DONE


def test_a_folder_is_checked_made_and_locked_in_one_step(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with Journal(tmp_path, shard=Shard(0, 2)):
            entered.set()

    other = threading.Thread(target=enter)
    with files.locked(tmp_path / journal.LOCK):
        other.start()
        assert not entered.wait(0.3) and not (tmp_path / "items").exists(), (
            "nothing is made while another process checks"
        )
    other.join(10)
    assert entered.is_set()


def test_a_killed_attempts_files_of_other_names_go(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(RUN)
    with Journal(tmp_path) as run:
        run.record(DONE, (), {"results_1.json": "{}", "log.txt": ""})
    (tmp_path / "journal.jsonl").write_bytes(b"")  # killed before its line was written
    with Journal(tmp_path) as run:
        again = run.record(DONE, (), {"results_2.json": "{}", "log.txt": ""})
    assert sorted(path.name for path in (tmp_path / str(again.outputs)).iterdir()) == [
        "log.txt",
        "results_2.json",
    ]
