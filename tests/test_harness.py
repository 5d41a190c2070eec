"""bench/table.py: what is timed, how it is compared, and what its JSON keeps."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bench.table import KEY, Table, Way, bytes_of, interleaved, record, spelled, timed


def test_every_way_runs_in_each_round_and_every_other_round_runs_backwards() -> None:
    ran: list[str] = []
    found = interleaved(
        {name: lambda name=name: ran.append(name) for name in "abc"},
        2,
        after=lambda: ran.append("-"),
    )
    assert "".join(ran) == "c-b-a-" + "a-b-c-" + "c-b-a-"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2, "c": 2}


def test_processor_seconds_and_bytes_belong_to_their_way() -> None:
    busy, idle = timed({"busy": lambda: sum(range(300_000)), "idle": lambda: None}, 3, {"busy": 10})
    assert busy.cpu_s is not None and idle.cpu_s is not None and busy.cpu_s > idle.cpu_s
    assert busy.gbps is not None and busy.gbps * busy.median_s * 1e9 == pytest.approx(10)
    assert idle.moved_bytes is None and idle.gbps is None


def table(**changes: object) -> Table:
    ways = (
        Way("ours", (2.0, 1.0, 9.0), moved_bytes=4),
        Way("theirs", (8.0,), note="v1"),
        Way("ours again", (3.0,)),
    )
    given = {
        "target": "P7",
        "case": "merge",
        "ways": ways,
        "against": "ours",
        "noise": ("ours", "ours again"),
    }
    return Table(**{**given, **changes})  # type: ignore[arg-type]


def test_ratios_are_of_medians_to_the_way_they_are_against() -> None:
    assert [table().ratio(way) for way in table().ways] == [1.0, 4.0, 1.5]
    assert table().noise_ratio == 1.5
    assert table(noise=None).noise_ratio is None


def test_columns_that_nothing_fills_are_left_out() -> None:
    header, rows = table().cells()
    assert header == ["way", "median", "lowest", "× ours", "GB/s", "bytes moved", "note"]
    assert rows[0][:4] == ["ours", "2.00 s", "1.00 s", "1"] and rows[1][-1] == "v1"
    assert "the same version timed twice: 1.500" in table().text()


def test_a_record_survives_json() -> None:
    benchmark = SimpleNamespace(extra_info={})
    one = table()
    record(benchmark, one.target, one.case, one.ways, against=one.against, noise=one.noise)
    record(benchmark, "P8", "none", one.ways, against="theirs")
    kept = json.loads(json.dumps(benchmark.extra_info))[KEY]
    assert [Table.of(found) for found in kept] == [one, Table("P8", "none", one.ways, "theirs")]


@pytest.mark.parametrize(
    "changes",
    [
        {"against": "cp"},
        {"noise": ("ours", "cp")},
        {"ways": (Way("ours", (1.0,)), Way("ours", (2.0,)))},
    ],
)
def test_a_name_that_is_not_there_or_is_twice_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="P7, merge: "):
        table(**changes)


def test_what_was_not_timed_is_no_way() -> None:
    with pytest.raises(ValueError, match="`cp` was not timed"):
        Way("cp", ())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (123.4, "123 s"), (0.1, "0.100 s"), (0.0482, "48.2 ms"), (7e-6, "7.00 µs")],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert spelled(seconds) == text


def test_bytes_have_three_digits() -> None:
    assert [bytes_of(count) for count in (None, 1500, 164_000_000, 2_118_000_000)] == [
        "",
        "1.50 kB",
        "164 MB",
        "2.12 GB",
    ]
