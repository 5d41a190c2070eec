"""How speeds are measured: bits first, ways in turn, ratios of medians, and what is kept."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from pa_fast.errors import WeightsError
from pa_fast.throughput.harness import (
    SPOT,
    Sample,
    Table,
    Way,
    WrongBits,
    by_itself,
    check_bits,
    format_size,
    format_timing,
    require_bits,
    spots,
    timed,
)


def test_every_way_runs_in_each_round_and_every_other_round_runs_backwards() -> None:
    ran: list[str] = []
    ways = [Way(name, lambda name=name: ran.append(name)) for name in "abc"]
    found = timed(ways, 2, after=lambda name: ran.append(name.upper()))
    assert "".join(ran) == "cCbBaA" + "aAbBcC" + "cCbBaA"
    assert {name: len(way.seconds) for name, way in found.items()} == {"a": 2, "b": 2, "c": 2}
    ran.clear()
    timed(ways[:2], 2, turn=False)
    assert ran == ["a", "b"] * 3


def test_processor_seconds_and_bytes_belong_to_their_way() -> None:
    found = timed(
        [Way("busy", lambda: sum(range(300_000)), moved_bytes=10), Way("idle", lambda: None)], 3
    )
    busy, idle = found["busy"], found["idle"]
    assert busy.cpu_s is not None and idle.cpu_s is not None and busy.cpu_s > idle.cpu_s
    assert busy.gbps is not None and busy.gbps * busy.median_s * 1e9 == pytest.approx(10)
    assert idle.moved_bytes is None and idle.gbps is None
    assert busy.work is None, "what is kept holds no tensors"


def test_seconds_are_those_of_one_run_of_several() -> None:
    clock = itertools.count(2.0, 2.0)
    way = Way("two", lambda: Sample(next(clock), 1.0, peak_bytes=7), runs=2)
    found = timed([way], 2, measure=by_itself, warm=0)["two"]
    assert (found.seconds, found.cpu_s, found.peak_bytes) == ((1.0, 2.0), 0.5, 7)
    assert found.spread == pytest.approx(2 / 3)


def table(**changes: object) -> Table:
    ways = (
        Way("ours", seconds=(2.0, 1.0, 9.0), moved_bytes=4_000_000_000),
        Way("theirs", seconds=(8.0,), note="v1"),
        Way("ours, again", seconds=(3.0,)),
    )
    given = {"target": "P7", "case": "merge", "ways": ways, "against": "ours"}
    return Table(**{**given, **changes})  # type: ignore[arg-type]


def test_ratios_are_of_medians_to_the_way_they_are_against() -> None:
    assert [table().ratio(way) for way in table().ways] == [1.0, 4.0, 1.5]
    assert table().noise == 1.5
    assert table(ways=table().ways[:2]).noise is None


def test_columns_that_nothing_fills_are_left_out() -> None:
    columns = table().columns()
    assert list(columns) == ["way", "median", "lowest", "× ours", "GB/s", "bytes moved", "note"]
    assert [columns[name][0] for name in list(columns)[:4]] == ["ours", "2.00 s", "1.00 s", "1"]
    assert columns["note"] == ["", "v1", ""]
    assert "the same version timed twice: 1.500" in table().text()
    shares = table(ceilings={"copy": 4.0, "stream": 2.5}).columns()
    assert (shares["of copy"], shares["of stream"][0]) == (["50.0%", "", ""], "80.0%")


def test_a_goal_that_was_judged_says_whether_it_is_met() -> None:
    assert table(headline="98 %").verdict == "98 %"
    assert table(headline="98 %", met=True).verdict == "98 %: met"
    assert "here: 90 %: NOT MET" in table(headline="90 %", met=False).text()


def test_a_table_survives_json() -> None:
    one = table(met=False, ceilings={"copy": 4.0})
    assert Table.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "changes",
    [
        {"against": "cp"},
        {"ways": (Way("ours", seconds=(1.0,)), Way("ours", seconds=(2.0,)))},
        {"ways": (Way("ours"),)},
    ],
    ids=["no such way", "two of one name", "not timed"],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="P7: merge: "):
        table(**changes)


def test_wrong_bits_have_no_speed() -> None:
    live = [torch.ones(10_000), torch.ones(5, dtype=torch.bfloat16)]

    def check() -> None:
        check_bits("dense", live, lambda t, at: torch.ones_like(live[t][at]))

    check()
    for t, place in ((0, 0), (0, 9_999), (1, 4)):
        live[t][place] = 2
        with pytest.raises(
            WrongBits, match=rf"dense: tensor {t}, element {place} is 2\.0, .* no speed"
        ):
            check()
        live[t][place] = 1
    require_bits(True, "dense")
    with pytest.raises(WeightsError, match="dense: wrong bits, so no speed"):
        require_bits(False, "dense")


def test_spots_reach_every_end() -> None:
    sizes = [10, 1, 4 * SPOT, 5 * SPOT + 3]
    found = list(spots(sizes))
    assert {t for t, _ in found} == {0, 1, 3}
    for t in (0, 1, 3):
        assert min(span.start for at, span in found if at == t) == 0
        assert max(span.stop for at, span in found if at == t) == sizes[t]
    assert all(span.start % SPOT == 0 and span.stop > span.start for _, span in found)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (123.4, "123 s"), (0.1, "0.100 s"), (0.0482, "48.2 ms"), (7e-6, "7.00 µs")],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert format_timing(seconds) == text


def test_bytes_have_three_digits() -> None:
    assert [format_size(count) for count in (None, 1500, 164_000_000, 2_118_000_000)] == [
        "",
        "1.50 kB",
        "164 MB",
        "2.12 GB",
    ]
