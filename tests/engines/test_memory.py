"""Memory of a loaded pair: planned before it is taken, said, and kept."""

from __future__ import annotations

import json
import pathlib
import sys
import threading

import pytest

import pa_fast
from pa_fast import cli
from pa_fast.errors import WeightsError
from tests import patience
from tests.engines.architectures import write_pair
from tests.programs import Program


def anonymous() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(small: tuple[pathlib.Path, ...], large: tuple[pathlib.Path, ...]) -> None:
    """Print what a process of its own takes to load `large`."""
    pa_fast.load(*small).set_lambda(0.3)  # libraries and their first allocations
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    lm = pa_fast.load(*large)
    lm.set_lambda(0.3)
    done.set()
    watcher.join()
    grown, live = max(most, anonymous()) - before, lm.weights.memory().live_bytes
    print(json.dumps({"grown": grown, "live": live, "notes": lm.notes}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_takes_the_live_copy_and_no_more(tmp_path: pathlib.Path) -> None:
    small = write_pair(tmp_path / "small", "llama")
    large = write_pair(tmp_path / "large", "llama", hidden_size=512, vocab_size=30_000)
    process = Program(measure, small, large, folder=tmp_path)
    out, errors = patience.communicate(process)
    assert process.returncode == 0, errors
    found = json.loads(out)
    assert found["live"] > 60e6
    assert 0.95 * found["live"] < found["grown"] < found["live"] + 15e6, (
        "both sides are maps, or pieces that are let go of again"
    )
    assert any("memory: 6" in note and "MB of mapped files" in note for note in found["notes"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is free")
def test_a_pair_that_does_not_fit_is_refused_before_it_takes_anything(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    monkeypatch.setattr("pa_fast.live.memory.available_bytes", lambda: 100_000)
    with pytest.raises(
        WeightsError, match=r"the live copy takes 1[0-9]+ kB, and 100 kB of memory are free"
    ):
        pa_fast.load(base, instruct)
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    what = [
        "--lambdas",
        "0.3",
        "--eval",
        f"perplexity:{tmp_path / 'text.txt'}",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["pa-fast", "sweep", str(base), str(instruct), *what])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "100 kB of memory are free\n\nhint: free some" in capsys.readouterr().err
