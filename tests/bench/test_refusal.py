"""`make bench` prints no speed of anything while a test of its bits fails, and none of what fails
while it is timed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from bench.__main__ import CHECKS, main
from bench.report import PAGE
from tests import patience

ROOT = pathlib.Path(__file__).parents[2]
WRONG_SWITCH = """
import pa_kernels, pa_kernels.dense
class Lerp(pa_kernels.Lerp):
    def __init__(self, live, *others):
        super().__init__(live, *others)
        self.first = live[0]
    def run_(self, *given):
        super().run_(*given)
        self.first.view(-1)[:1] = 9
pa_kernels.Lerp = pa_kernels.dense.Lerp = Lerp
"""
WRONG_CHECKSUM = "import pa_kernels\npa_kernels.checksum = lambda tensors: [0 for _ in tensors]\n"


def bench(folder: pathlib.Path, broken: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make bench` with the code `broken` at the start of its own process and of pytest's, as a
    wrong edit of the kernels would be."""
    where = "import sys\nif {'bench', 'pytest'} & {*sys.orig_argv}:\n"
    (folder / "sitecustomize.py").write_text(where + textwrap.indent(broken, "    "))
    path = os.pathsep.join([str(folder), str(ROOT / "kernels")])
    asked = {
        "PA_FAST_BENCH_SIZE": "tiny",
        "PA_FAST_BENCH_ROUNDS": "1",
        "PYTHONPATH": path,
    }
    return patience.run(
        [
            sys.executable,
            "-m",
            "bench",
            "--out",
            str(folder / "results"),
            "--json",
            str(folder / "run.json"),
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, **asked},
    )


def test_a_switch_with_one_wrong_weight_is_not_timed(tmp_path: pathlib.Path) -> None:
    done = bench(tmp_path, WRONG_SWITCH, "--check", "tests/kernels/test_dense.py", "-k", "start")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no speed is printed" in done.stderr
    assert "1 failed" in done.stdout and "P13" not in done.stdout and "median" not in done.stdout
    assert not (tmp_path / "results").exists()


def test_no_test_at_all_is_not_a_pass(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_none.py").write_text(
        "import pytest\n\n@pytest.mark.skip\ndef test_nothing():\n    pass\n"
    )
    assert (
        main(["--check", str(tmp_path / "test_none.py"), "--out", str(tmp_path / "results")]) == 1
    )
    assert "no speed is printed" in capfd.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_fails_while_it_is_timed_is_named_without_a_speed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_fine.py").write_text("def test_fine():\n    pass\n")
    page = PAGE.read_bytes()
    done = bench(
        tmp_path,
        WRONG_CHECKSUM,
        "--check",
        str(tmp_path / "test_fine.py"),
        "-k",
        "start or checksum",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (csv,), (markdown,) = (
        [file.read_text() for file in (tmp_path / "results").glob(f"*-tiny.{kind}")]
        for kind in ("csv", "md")
    )
    assert "Failed, so without a speed:\n- checksum" in markdown
    assert "pa_kernels.checksum" not in csv + markdown and "pa-fast --help, again" in csv
    assert (
        "| P1 | dense switch, 8B shapes, on a GPU |" in markdown
        and "| P13 | start, whole processes |" in markdown
    )
    assert PAGE.read_bytes() == page, "figures of tiny sizes are not for the page"


def test_an_unknown_size_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PA_FAST_BENCH_SIZE", "2b")
    with pytest.raises(SystemExit):
        main([])
    assert "PA_FAST_BENCH_SIZE=2b is not known: write one of tiny, 100m" in capsys.readouterr().err


def test_the_tests_that_come_first_exist() -> None:
    assert [name for name in CHECKS if not (ROOT / name).exists()] == []
