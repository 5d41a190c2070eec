"""The identity of a run is every bit of its checkpoints; a source that changes is noticed, whatever
is put back."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import pa_fast
from pa_fast.base import Item, Score, complete_evaluator
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.engines.content import Content
from pa_fast.errors import DataError, RunError
from pa_fast.sweep import manifest, results
from pa_fast.sweep.recording import Recording
from pa_fast.sweep.schedule import Schedule
from tests.engines.architectures import write_model, write_pair
from tests.engines.test_loading import edit


class Norm:
    """An evaluator of the weights alone."""

    name, higher_is_better = "norm", True

    def __call__(self, engine: Any) -> Score:
        value = float(sum(p.float().square().sum() for p in engine.model.parameters()))
        return Score(value, "norm", 1, [Item("0", "all", value)])


def unsampled_rows(folder: pathlib.Path, name: str = "model.embed_tokens.weight") -> slice:
    """32 rows of a tensor of which the quick fingerprint looks at no byte."""
    before = Checkpoint.open(folder)
    quick = before.quick_fingerprint()
    info = before.tensors[name]
    for start in range(0, info.shape[0] - 31, 32):
        whole = info.file.read_bytes()
        width = info.nbytes // info.shape[0]
        at = info.start + start * width
        info.file.write_bytes(
            whole[:at]
            + bytes(b ^ 1 for b in whole[at : at + 32 * width])
            + whole[at + 32 * width :]
        )
        same = Checkpoint.open(folder).quick_fingerprint() == quick
        info.file.write_bytes(whole)
        if same:
            return slice(start, start + 32)
    raise AssertionError("the sample covers every row")


def change_rows(folder: pathlib.Path, name: str = "model.embed_tokens.weight") -> None:
    rows = unsampled_rows(folder, name)
    file = Checkpoint.open(folder).tensors[name].file
    tensors = load_file(file)
    tensors[name][rows] *= 2
    save_file(tensors, file, {"format": "pt"})


def old(run: pathlib.Path, *unrecorded: str) -> None:
    """Make of a run folder what a version with checksums of version 1 left, which did not say so;
    or an even earlier one, without content sums."""
    document = json.loads((run / "run.json").read_text())
    assert {"checksum", "base_content", "instruct_content"} <= document["engine"].keys()
    for key in ("checksum", *unrecorded):
        del document["engine"][key]
    for key in {"base_content", "instruct_content"} - set(unrecorded):
        document["engine"][key] = "0123456789abcdef"
    (run / "run.json").write_text(json.dumps(document))


@pytest.mark.parametrize("side", ["base", "instruct"])
@pytest.mark.parametrize("store", ["dense", "packed"])
def test_rows_that_no_sample_sees_are_another_checkpoint(
    tmp_path: pathlib.Path, side: str, store: str
) -> None:
    folders = write_pair(tmp_path, "llama", vocab_size=512)
    pa_fast.sweep(
        pa_fast.load(*folders, store=store), "0,0.5", [Norm()], tmp_path / "run", figure=False
    )
    change_rows(tmp_path / side)
    with pytest.raises(
        RunError, match=rf'engine\.{side}_content: recorded "[0-9a-f]{{16}}", now "[0-9a-f]{{16}}"'
    ):
        pa_fast.sweep(
            pa_fast.load(*folders, store=store), "0.25", [Norm()], tmp_path / "run", figure=False
        )


@pytest.mark.parametrize(
    "architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "mixtral"]
)
def test_every_way_to_hold_a_pair_gives_the_content_that_a_merge_gives(
    tmp_path: pathlib.Path, architecture: str
) -> None:
    base, instruct = write_pair(tmp_path, architecture)
    report = pa_fast.merge(base, instruct, 0.5, tmp_path / "merged")
    expected = report.base_fingerprint, report.instruct_fingerprint
    options: list[dict[str, Any]] = [
        {"store": s} for s in ("dense", "packed", "sparse", "lowrank", "attached")
    ]
    options += [
        {"endpoint_check": False},
        {"allow_nonfinite": True, "store": "packed"},
        {"dtype": "float32"},
    ]
    for one in options:
        lm = pa_fast.load(base, instruct, **one)
        assert (lm.identity["base_content"], lm.identity["instruct_content"]) == expected, one
    pa_fast.encode(base, instruct, tmp_path / "delta", format="sparse")
    lm = pa_fast.load(base, delta=tmp_path / "delta")
    assert lm.identity["base_content"] == expected[0] and "instruct_content" not in lm.identity
    for folder in (base, instruct):
        edit(folder, lambda tensors: None)  # one file each
    lm = pa_fast.load(base, instruct)
    assert (
        lm.identity["base_content"],
        lm.identity["instruct_content"],
    ) == expected, "however they are sharded"


def test_a_head_that_is_tied_on_one_side_is_summed_once(tmp_path: pathlib.Path) -> None:
    write_model(tmp_path / "base", "llama", 1, tie_word_embeddings=True)
    write_model(tmp_path / "instruct", "llama", 2, tie_word_embeddings=False)
    report = pa_fast.merge(tmp_path / "base", tmp_path / "instruct", 0.5, tmp_path / "merged")
    lm = pa_fast.load(tmp_path / "base", tmp_path / "instruct")
    assert lm.identity["base_content"] == report.base_fingerprint
    assert lm.identity["instruct_content"] == report.instruct_fingerprint


def test_a_dense_load_sums_what_it_reads_anyway(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = Content.digests

    def digests(self: Content, keys: Any, dtypes: Any) -> Any:
        read.extend(keys)
        return plain(self, keys, dtypes)

    monkeypatch.setattr(Content, "digests", digests)
    pa_fast.load(*write_pair(tmp_path, "llama"))
    assert read == []


@pytest.mark.parametrize("unrecorded", [(), ("base_content", "instruct_content")])
def test_a_run_of_earlier_checksums_says_so_and_is_left_as_it_is(
    tmp_path: pathlib.Path, unrecorded: tuple[str, ...]
) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    pa_fast.sweep(lm, "0,0.5", [Norm()], tmp_path / "run", figure=False)
    old(tmp_path / "run", *unrecorded)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for lambdas_ in ("0.25", "0,0.5"):
        with pytest.raises(
            RunError,
            match="recorded with checksums of version 1, and this pa_fast computes version 2:"
            " whether the weights are the same cannot be told",
        ):
            pa_fast.sweep(lm, lambdas_, [Norm()], tmp_path / "run", figure=False)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    assert len(results.load(tmp_path / "run").rows) == 2


def test_a_run_of_earlier_checksums_without_a_point_goes_on(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    pa_fast.sweep(lm, "0.5", [Norm()], tmp_path / "run", figure=False)
    old(tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    assert len(pa_fast.sweep(lm, "0.5", [Norm()], tmp_path / "run", figure=False).rows) == 1
    assert manifest.load(tmp_path / "run").engine == lm.identity


def test_of_a_run_of_earlier_checksums_any_other_difference_is_named(
    tmp_path: pathlib.Path,
) -> None:
    """Also in a process that has no engine of its own, such as that which records for workers."""
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    pa_fast.sweep(lm, "0.5", [Norm()], tmp_path / "run", figure=False)
    old(tmp_path / "run")
    now = manifest.describe(lm, Schedule.of("0.25"), [complete_evaluator(Norm())])
    with (
        pytest.raises(RunError, match="checksums of version 1"),
        Recording(tmp_path / "run", Schedule.of("0.25"), now),
    ):
        raise AssertionError("unreached")
    other = dataclasses.replace(now, engine={**now.engine, "dtype": "float16"})
    with pytest.raises(RunError, match=r"engine\.dtype"):
        manifest.reconcile(tmp_path / "run", other, {"norm"})


def rewrite(file: pathlib.Path) -> None:
    """Flip a bit of the last byte, and put the mtime back."""
    before = os.stat(file)
    with open(file, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)[0]
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite_and_remove(file: pathlib.Path) -> None:
    rewrite(file)
    file.unlink()


@pytest.mark.parametrize("change", [rewrite, rewrite_and_remove])
def test_a_source_that_is_rewritten_with_its_mtime_put_back_is_noticed(
    tmp_path: pathlib.Path, change: Callable[[pathlib.Path], None]
) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    lm.set_lambda(0.3)
    change(next(iter((tmp_path / "instruct").glob("*.safetensors"))))
    for reads in (lambda: lm.set_lambda(0.6), lm.weights.verify, lm.weights.checksum):
        with pytest.raises(
            DataError, match=r"instruct/model.*safetensors: the file changed .* its mtime put back"
        ):
            reads()
    assert lm.lam == 0.3


@pytest.mark.parametrize(
    "change",
    [
        lambda file: os.link(file, f"{file}.kept"),
        lambda file: os.chmod(file, 0o600),
        lambda file: file.unlink(),
    ],
)
def test_a_source_that_only_gets_another_name_or_permission_is_the_same(
    tmp_path: pathlib.Path, change: Callable[[pathlib.Path], None]
) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    change(next(iter((tmp_path / "instruct").glob("*.safetensors"))))
    lm.set_lambda(0.6)
    assert lm.weights.verify()


def test_a_rewritten_source_is_noticed_while_it_is_read(tmp_path: pathlib.Path) -> None:
    base, _ = write_pair(tmp_path, "llama")
    with Checkpoint.open(base) as found:
        before = found.state()
        rewrite(next(iter(base.glob("*.safetensors"))))
        with pytest.raises(DataError, match="its ctime moved, and its mtime did not"):
            found.check_all_unchanged()
    with Checkpoint.open(base) as again:
        assert again.state() != before, "an unfinished merge of what it was must not go on"
