"""What `pa-fast bench` reports, of a folder's own shapes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import pytest
import torch

from pa_fast import cli
from pa_fast.errors import UsageError
from pa_fast.throughput import RELATIVE, measure
from pa_fast.throughput.shapes import fitting, shapes
from tests.checkpoint.pairs import write_checkpoint


def test_all_stores_and_ceilings_of_a_folders_shapes(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "model", {"a": torch.zeros(160, 128), "b": torch.zeros(77)})
    found = measure("cpu", str(tmp_path / "model"), rounds=1)
    assert (found.tensors, found.weights) == (2, 160 * 128 + 77)
    rows = {
        (row["relative_delta"], row["what"]): row for row in json.loads(found.to_json())["rows"]
    }
    for what in (
        "copy",
        "flat torch.add(out=)",
        "flat torch.lerp(out=)",
        "flat switch",
        "file copy",
    ):
        assert rows[None, what]["gbps"] > 0
    for relative in RELATIVE:
        assert {what for at, what in rows if at == relative} >= {"dense", "dense, again", "packed"}
        assert (
            rows[relative, "packed"]["bytes_per_weight"]
            < rows[relative, "dense"]["bytes_per_weight"]
            == 6
        )
    for what in (
        "sparse, 2% of the weights",
        "sparse, 2% of the weights, again",
        "low rank 64, its matrices",
    ):
        assert rows[0.017, what]["gbps"] > 0


def test_shapes_that_do_not_exist_or_fit(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="shape `9b` is not known"):
        shapes("9b")
    with pytest.raises(UsageError, match="no tensor of these shapes fits"):
        fitting([(1 << 40, 1 << 10)], torch.device("cpu"))
    assert fitting([(1 << 40, 1 << 10), (3, 4)], torch.device("cpu")) == [(3, 4)]
    with pytest.raises(UsageError, match="device `tpu`"):
        measure("tpu")


@pytest.mark.parametrize(("factor", "noted"), [(1.2, False), (3.0, True), (0.3, True)])
def test_a_machine_whose_timings_do_not_repeat_is_said_to_be_one(
    factor: float,
    noted: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_checkpoint(tmp_path / "model", {"a": torch.zeros(160, 128)})
    found = measure("cpu", str(tmp_path / "model"), rounds=1)
    relative = next(iter(found.pairs))
    seconds = {"dense": (1.0,), "dense, again": (factor,)}
    table = found.pairs[relative]
    ways = tuple(
        dataclasses.replace(way, seconds=seconds[way.name])
        for way in table.ways
        if way.name in seconds
    )
    found = dataclasses.replace(found, pairs={relative: dataclasses.replace(table, ways=ways)})
    monkeypatch.setattr("pa_fast.throughput.measure", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["pa-fast", "bench"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert ("timed twice, differs by" in capsys.readouterr().err) is noted
