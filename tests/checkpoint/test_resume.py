"""Merges that end too early: what they leave never loads wrong, and the next run goes on from it to
the same bytes.

`PA_FAST_KILLS=30` for more kills than the few of the normal suite.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_kernels import reference
from pa_kernels.reference import Draw

from pa_fast.checkpoint.merge import MergeReport, merge
from pa_fast.checkpoint.provenance import read_provenance
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.verify import verify
from pa_fast.errors import CheckpointError, DataError, OutputError, PairError
from tests.checkpoint.pairs import CONFIG, load_folder, same_bits, write_checkpoint, write_pair

KILLS = int(os.environ.get("PA_FAST_KILLS", "6"))
LOG = ".pa_fast.shards.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def interrupted(after: int) -> Callable[[int, int], None]:
    """A progress function that is Ctrl-C once `after` bytes are written."""

    def stop(done: int, total: int) -> None:
        if done > after:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Path]:
    """A pair whose base has three files of 40 kB."""
    tensors = {
        f"w{n}": torch.randn(10_000, generator=torch.Generator().manual_seed(n)) for n in range(3)
    }
    moved = {name: tensor + 0.1 for name, tensor in tensors.items()}
    return write_checkpoint(tmp_path / "base", tensors, shards=3), write_checkpoint(
        tmp_path / "instruct", moved
    )


@pytest.fixture
def unfinished(tmp_path: Path, three: tuple[Path, Path]) -> Path:
    """The folder of a merge of `three` that was interrupted in its last file."""
    with pytest.raises(KeyboardInterrupt):
        merge(*three, 0.3, tmp_path / "out", progress=interrupted(80_000))
    partial = tmp_path / ".out.pa_fast.partial"
    assert sorted(path.name for path in partial.glob("*.safetensors")) == [
        f"model-{n:05d}-of-00003.safetensors" for n in (1, 2)
    ], "two of three files should be complete"
    return partial


ALL: dict[str, Any] = {
    "rounding": "stochastic",
    "seed": 3,
    "rule": [{"match": "lm_head.*", "times": "1/2"}, {"group": "norms", "lambda": 1}],
}


def uneven(root: Path) -> tuple[Path, Path]:
    """An fp32 base that ties its head, and a bf16 instruct model of ten more rows with a head of
    its own."""
    chance = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (8190, 64), "model.norm.weight": (64,), "v": (5000,)}
    base = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    more = torch.randn(10, 64, generator=chance)
    instruct = {
        name: value + 0.01 * torch.randn(value.shape, generator=chance)
        for name, value in base.items()
    }
    instruct["model.embed_tokens.weight"] = torch.cat([instruct["model.embed_tokens.weight"], more])
    instruct["lm_head.weight"] = instruct["model.embed_tokens.weight"] + 0.01
    said = {"shards": 3, "tokenizer": {"model": {"vocab": {"a": 0}}}}
    return (
        write_checkpoint(
            root / "base",
            base,
            config=CONFIG | {"vocab_size": 8190, "tie_word_embeddings": True},
            **said,
        ),
        write_checkpoint(
            root / "instruct",
            {name: value.bfloat16() for name, value in instruct.items()},
            config=CONFIG | {"vocab_size": 8200},
            **said,
        ),
    )


@contextlib.contextmanager
def children(root: Path, **options: Any) -> Iterator[Callable[[int], str]]:
    """Merges of the pair in `root` into `out`, killed at a given call: see
    tests/checkpoint/killed.py."""
    folders = [str(root / name) for name in ("base", "instruct", "out")]
    command = [sys.executable, "-m", "tests.checkpoint.killed", *folders, json.dumps(options)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout

        def run(last: int) -> str:
            print(last, file=process.stdin, flush=True)
            return process.stdout.readline().strip()  # type: ignore[union-attr]

        yield run
        process.stdin.close()


def test_kills_at_any_moment_lose_nothing_and_leave_nothing_wrong(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, shards=(3, 2))
    with children(tmp_path) as run:
        check_kills(tmp_path, pair, run, KILLS)


MORE_KILLS = 16
"""So many more where no run had a complete shard to go on from: how many calls a merge makes, and
so where a kill falls, differs from one version of Python to another."""


def check_kills(
    tmp_path: Path, pair: tuple[Path, Path], children: Callable[[int], str], kills: int
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.pa_fast.partial"
    calls = int(children(0).split()[0])
    assert verify(out, *pair).ok
    expected = contents(out)
    chance = random.Random(0)
    resumed = 0
    for n in range(kills + MORE_KILLS):
        if n >= kills and resumed:
            break
        first = n % kills * calls // kills
        shutil.rmtree(out)
        moments = [1 + first + chance.randrange(max(calls // kills, 1))]
        moments += [1 + chance.randrange(calls) for _ in range(chance.randrange(3))]
        for moment in moments:
            answer = children(moment)
            assert answer == "killed" or answer.split()[0].isdigit(), answer
            if out.exists():
                assert contents(out) == expected, f"what has the final name is complete ({moments})"
                break
            if partial.exists():
                try:
                    Checkpoint.open(partial).close()
                except CheckpointError:
                    pass
                else:
                    assert verify(partial, *pair).ok, f"what loads is right ({moments})"
        else:
            resumed += int(children(0).split()[1])
        assert contents(out) == expected, f"another run ends in the same bytes ({moments})"
        left = {path.name for path in tmp_path.iterdir()}
        # a kill after the last rename leaves an unlocked lock file
        assert left - {".out.pa_fast.lock"} == {"base", "instruct", "out"}, moments
    assert resumed, "no run went on from a complete shard: the test shows nothing"


def test_everything_at_once_goes_on_after_kills(tmp_path: Path) -> None:
    """Rows of one side across a chunk's end, a head tied on one side, two dtypes, a rule, noise;
    against plain torch."""
    pair = uneven(tmp_path)
    with children(tmp_path, **ALL) as run:
        check_kills(tmp_path, pair, run, 4)
    said = read_provenance(tmp_path / "out")
    assert said and (said.options.extra_rows, str(said.spec.rounding)) == (
        "instruct",
        "stochastic, seed 3",
    )
    written = json.loads((tmp_path / "out" / "pa_fast.json").read_text())
    assert written["tied_head"] == {
        "name": "lm_head.weight",
        "side": "base",
        "embedding": "model.embed_tokens.weight",
    }
    rows = ["lm_head.weight", "model.embed_tokens.weight"]
    (kept,) = written["kept_rows"]
    assert (
        kept == {"side": "instruct", "first": 8190, "last": 8199, "tensors": kept["tensors"]}
        and sorted(kept["tensors"]) == rows
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- `lm_head.weight` is tied in base only" in card and "- rows 8190 to 8199 of `" in card
    b, i, merged = (load_folder(tmp_path / side) for side in ("base", "instruct", "out"))
    b["lm_head.weight"] = b["model.embed_tokens.weight"]
    for name, lam in (
        ("model.embed_tokens.weight", 0.3),
        ("lm_head.weight", 0.15),
        ("model.norm.weight", 1.0),
        ("v", 0.3),
    ):
        own = torch.cat([b[name], i[name][len(b[name]) :].float()])
        draw = Draw(zlib.crc32(name.encode()) ^ 3)
        assert same_bits(merged[name], reference.lerp(own, i[name], lam, draw=draw)), name


@pytest.mark.parametrize(
    "changed",
    [{"seed": 4}, {"rule": None}, {"rounding": "nearest", "seed": None}, {"dtype": "float16"}],
)
def test_only_the_same_merge_goes_on(tmp_path: Path, changed: dict[str, Any]) -> None:
    pair = uneven(tmp_path)
    for options, resumed in ((ALL | changed, 0), (ALL, 2)):
        with pytest.raises(KeyboardInterrupt):
            merge(*pair, 0.3, tmp_path / "out", **ALL, progress=interrupted(2_099_328))
        assert merge(*pair, 0.3, tmp_path / "out", **options).resumed == resumed
        assert verify(tmp_path / "out", *pair).ok
        shutil.rmtree(tmp_path / "out")


def test_rows_may_be_refused_by_a_merge_and_so_by_its_check(
    tmp_path: Path, three: tuple[Path, Path]
) -> None:
    merge(*three, 0.3, tmp_path / "out", extra_rows="refuse")
    assert "--extra-rows refuse" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", *three).ok
    uneven(tmp_path / "other")
    with pytest.raises(PairError, match="8190 vocabulary rows in base and 8200 in instruct"):
        verify(tmp_path / "out", tmp_path / "other" / "base", tmp_path / "other" / "instruct")


def test_complete_files_are_not_written_again(
    tmp_path: Path, three: tuple[Path, Path], unfinished: Path
) -> None:
    before = {path.name: path.stat() for path in unfinished.glob("*.safetensors")}
    seen: list[tuple[int, int]] = []
    report = merge(
        *three, 0.3, tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    after = {name: (tmp_path / "out" / name).stat() for name in before}
    assert all(
        (s.st_ino, s.st_mtime_ns) == (after[n].st_ino, after[n].st_mtime_ns)
        for n, s in before.items()
    )
    assert report.resumed == 2 and seen[-1][0] == seen[-1][1]
    again = merge(*three, 0.3, tmp_path / "again")
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "again")
    assert ours.pop("README.md") != theirs.pop("README.md"), "the card names the folder"
    assert ours == theirs and again.resumed == 0
    assert (report.base_fingerprint, report.instruct_fingerprint) == (
        again.base_fingerprint,
        again.instruct_fingerprint,
    )


def flip(partial: Path) -> None:
    with open(partial / "model-00001-of-00003.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def rename_tensor(partial: Path) -> None:
    file = partial / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"w0"', b'"w9"'))


def lie(partial: Path) -> None:
    log = partial / LOG
    log.write_text(log.read_text().replace('"w0": ["', '"w0": ["f', 1))


DAMAGES: list[Callable[[Path], Any]] = [
    flip,
    rename_tensor,
    lie,
    lambda partial: os.truncate(partial / "model-00001-of-00003.safetensors", 100),
    lambda partial: os.remove(partial / "model-00001-of-00003.safetensors"),
    lambda partial: os.truncate(partial / LOG, (partial / LOG).stat().st_size - 20),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["bit", "header", "log", "shorter", "gone", "torn"])
def test_a_file_that_is_not_what_was_written_is_written_again(
    tmp_path: Path, three: tuple[Path, Path], unfinished: Path, damage: Callable[[Path], Any]
) -> None:
    damage(unfinished)
    assert merge(*three, 0.3, tmp_path / "out").resumed == 1
    assert verify(tmp_path / "out", *three).ok
    assert LOG not in contents(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"job": 1}', '{"job": "x", "file": "../../base", "tensors": {}}', "\x00\xff"],
)
def test_a_log_of_anything_else_counts_for_nothing(
    tmp_path: Path, three: tuple[Path, Path], unfinished: Path, text: str
) -> None:
    (unfinished / LOG).write_text(text)
    assert merge(*three, 0.3, tmp_path / "out").resumed == 0
    assert verify(tmp_path / "out", *three).ok


def test_another_job_starts_afresh(
    tmp_path: Path, three: tuple[Path, Path], unfinished: Path
) -> None:
    kept = tmp_path / "kept"
    unfinished.rename(kept)

    def run(pair: tuple[Path, Path] = three, lam: float = 0.3, **options: Any) -> MergeReport:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(kept, unfinished)
        report = merge(*pair, lam, tmp_path / "out", **options)
        assert verify(tmp_path / "out", *pair).ok
        return report

    assert run().resumed == 2
    assert run(lam=0.4).resumed == 0
    assert run(dtype="bfloat16").resumed == 0
    assert run(max_shard_size=40_000).resumed == 2, "the same files, whoever asked for them"
    assert run(max_shard_size="1MB").resumed == 0
    assert run(allow_nonfinite=True).resumed == 0
    os.utime(three[1] / "model.safetensors", ns=(1, 1))
    assert run().resumed == 0, "a source that was written to since"


def test_an_error_leaves_nothing(
    tmp_path: Path, three: tuple[Path, Path], unfinished: Path
) -> None:
    def touch(done: int, total: int) -> None:
        os.utime(three[0] / "model-00003-of-00003.safetensors", ns=(1, 1))

    with pytest.raises(DataError, match="changed while it was read"):
        merge(*three, 0.3, tmp_path / "out", progress=touch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "instruct"]


def test_complete_files_count_as_space_that_is_there(
    tmp_path: Path, three: tuple[Path, Path], unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pa_fast.checkpoint.writer._SPARE_BYTES", 0)
    free = 41_000  # one more file, not three
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    )
    with pytest.raises(OutputError, match="are free on its disk"):
        merge(*three, 0.4, tmp_path / "other")
    assert merge(*three, 0.3, tmp_path / "out").resumed == 2


def test_the_log_is_what_its_page_says(unfinished: Path) -> None:
    lines = [json.loads(line) for line in (unfinished / LOG).read_text().splitlines() if line]
    assert [line["file"] for line in lines] == [
        f"model-{n:05d}-of-00003.safetensors" for n in (1, 2)
    ]
    assert all(
        len(sums) == 3 and all(len(one) == 16 for one in sums)
        for line in lines
        for sums in line["tensors"].values()
    )
