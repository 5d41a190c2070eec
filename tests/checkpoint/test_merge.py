"""Merged folders: the contract bit for bit, and everything else that a Hugging Face folder
holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_kernels import checksum, reference

import pa_fast.checkpoint.streaming as streaming
from pa_fast.base import Lambda
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.provenance import name_hash
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.verify import verify
from pa_fast.errors import DataError, OutputError, PairError, UsageError
from tests.checkpoint.pairs import (
    CONFIG,
    LAMBDAS,
    load_folder,
    random_tensors,
    same_bits,
    write_checkpoint,
    write_pair,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16), (BF16, FP16), (FP16, FP32)]


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize(
    ("base", "instruct"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
def test_every_tensor_follows_the_contract(
    tmp_path: Path, base: torch.dtype, instruct: torch.dtype, lam: str
) -> None:
    folders = write_pair(tmp_path, base, instruct, shards=(3, 2))
    report = merge(*folders, lam, tmp_path / "out")
    b, i, w = (load_folder(folder) for folder in (*folders, tmp_path / "out"))
    assert set(w) == set(b)
    for name in w:
        assert same_bits(w[name], reference.lerp(b[name], i[name], Lambda(lam), dtype=instruct)), (
            name
        )
        if base == instruct == BF16 and lam not in ("0", "1"):
            assert torch.equal(w[name], torch.lerp(b[name], i[name], float(Lambda(lam)))), name
        if lam in ("0", "1") and base == instruct:
            assert same_bits(w[name], (b if lam == "0" else i)[name]), name
    assert (report.lam, report.tensors, report.dtype) == (lam, len(b), "auto")
    assert verify(tmp_path / "out", *folders).ok


def test_chunks_and_workers_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = {"w": torch.randn(300_000).bfloat16(), "v": torch.randn(70_001)}
    i = {name: value + 0.1 for name, value in b.items()}
    folders = write_checkpoint(tmp_path / "base", b), write_checkpoint(tmp_path / "instruct", i)
    whole = merge(*folders, 0.3, tmp_path / "whole")
    monkeypatch.setattr(streaming, "CHUNK_ELEMENTS", 2**16)
    cut = merge(*folders, 0.3, tmp_path / "cut")
    for name, value in load_folder(tmp_path / "whole").items():
        assert same_bits(value, load_folder(tmp_path / "cut")[name])
        assert same_bits(value, reference.lerp(b[name], i[name], 0.3))
    assert (whole.base_fingerprint, whole.instruct_fingerprint) == (
        cut.base_fingerprint,
        cut.instruct_fingerprint,
    )
    expected = sum(name_hash(name) * checksum([value])[0] for name, value in b.items()) % 2**64
    assert whole.base_fingerprint == f"{expected:016x}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_given_dtype_is_rounded_to_once(tmp_path: Path, dtype: str) -> None:
    folders = write_pair(tmp_path, FP32, BF16)
    merge(*folders, "1/3", tmp_path / "out", dtype=dtype)
    b, i, w = (load_folder(folder) for folder in (*folders, tmp_path / "out"))
    for name in w:
        assert same_bits(
            w[name], reference.lerp(b[name], i[name], 1 / 3, dtype=getattr(torch, dtype))
        ), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **CONFIG,
        "torch_dtype": dtype,
    }
    assert verify(tmp_path / "out", *folders).ok


def test_shards_are_cut_and_indexed(tmp_path: Path) -> None:
    folders = write_pair(tmp_path, shards=(2, 3))
    report = merge(*folders, 0.5, tmp_path / "out", max_shard_size="600B")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) == report.shards > 1 and set(index["weight_map"].values()) == set(files)
    merged = load_folder(tmp_path / "out")
    assert set(index["weight_map"]) == set(merged)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in merged.values())
    with Checkpoint.open(tmp_path / "out") as found:
        for file in files:
            held = [info for info in found.tensors.values() if info.file.name == file]
            assert len(held) == 1 or sum(info.nbytes for info in held) <= 600


def test_shards_are_cut_as_the_bases_are(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path, FP32, BF16, shards=(3, 2))
    merge(base, instruct, 0.5, tmp_path / "out")
    cut: list[dict[str, set[str]]] = []
    for folder in (base, tmp_path / "out"):
        with Checkpoint.open(folder) as found:
            cut.append({})
            for name, info in found.tensors.items():
                cut[-1].setdefault(info.file.name, set()).add(name)
    assert cut[0] == cut[1] and len(cut[0]) == 3


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    merge(*write_pair(tmp_path, shards=(2, 3)), 0.5, tmp_path / "out", max_shard_size="5GB")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "pa_fast.json",
    }


def test_companions_are_instructs(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path)
    for name in (
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    ):
        (base / name).write_text("base's")
        (instruct / name).write_text("instruct's")
    (instruct / "tokenizer_config.json").symlink_to(instruct / "vocab.json")
    for name in (
        ".secret",
        "pytorch_model.bin",
        "training_args.bin",
        "stale.safetensors.index.json",
        "README.md",
    ):
        (instruct / name).write_text("not to be copied")
    (instruct / "original").mkdir()
    merge(base, instruct, 0.5, tmp_path / "out")
    out = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(out) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "pa_fast.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "tokenizer_config.json",
    }
    assert not out["tokenizer_config.json"].is_symlink()
    assert out["tokenizer_config.json"].read_text() == out["vocab.json"].read_text() == "instruct's"
    assert out["config.json"].read_bytes() == (instruct / "config.json").read_bytes()
    assert "not to be copied" not in out["README.md"].read_text()


def test_provenance(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path)
    report = merge(base, instruct, "1/3", tmp_path / "out", dtype="float16")
    found = json.loads((tmp_path / "out" / "pa_fast.json").read_text())
    assert (found["lambda"], found["rounding"], found["rule"], found["dtype"]) == (
        "1/3",
        "nearest",
        None,
        "float16",
    )
    assert found["base"]["content_fingerprint"] == report.base_fingerprint
    assert found["instruct"]["quick_fingerprint"] == Checkpoint.open(instruct).quick_fingerprint()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"B   {base}\n    I   {instruct}\n" in card and "λ = 1/3" in card
    assert (
        f"pa-fast merge {base} {instruct} --lambda=1/3 --out {tmp_path / 'out'} --dtype float16"
        in card
    )


def test_hostile_names_cannot_break_the_model_card(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path / 'a"\nlicense: mit #')
    merge(base, instruct, 0.5, tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert "\nlicense" not in front


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["base", "instruct"])
@pytest.mark.parametrize("lam", ["0", "0.3", "1", "1e-60"])
def test_non_finite_weights_are_refused_by_name(
    tmp_path: Path, side: str, lam: str, bad: float
) -> None:
    both = {"base": random_tensors(BF16), "instruct": random_tensors(BF16)}
    both[side]["a.odd"][3, 4, 1] = bad
    folders = [write_checkpoint(tmp_path / name, tensors) for name, tensors in both.items()]
    with pytest.raises(DataError, match=f"tensor `a.odd` of {side} has non-finite weights \\(1 in"):
        merge(*folders, lam, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "instruct",
    ], "nothing is left behind"


def test_non_finite_weights_pass_when_allowed(tmp_path: Path) -> None:
    b, i = random_tensors(BF16, 1), random_tensors(BF16, 2)
    b["a.odd"][0, 0, 0] = float("inf")
    i["a.odd"][0, 0, 1] = float("nan")
    b["a.odd"][0, 0, 2] = i["a.odd"][0, 0, 2] = float("nan")
    folders = write_checkpoint(tmp_path / "base", b), write_checkpoint(tmp_path / "instruct", i)
    for lam in ("0", "0.3", "1"):
        merge(*folders, lam, tmp_path / lam, allow_nonfinite=True)
        assert same_bits(
            load_folder(tmp_path / lam)["a.odd"], reference.lerp(b["a.odd"], i["a.odd"], float(lam))
        )
        assert verify(tmp_path / lam, *folders).ok


def test_large_finite_weights_are_not_taken_for_infinite(tmp_path: Path) -> None:
    tensors = {"w": torch.full((1000,), 3e38).bfloat16()}
    folders = (
        write_checkpoint(tmp_path / "base", tensors),
        write_checkpoint(tmp_path / "instruct", tensors),
    )
    merge(*folders, 0.5, tmp_path / "out")
    assert same_bits(load_folder(tmp_path / "out")["w"], tensors["w"])


def test_a_result_that_overflows_is_refused(tmp_path: Path) -> None:
    b, i = {"w": torch.zeros(100)}, {"w": torch.full((100,), 60000.0)}
    folders = write_checkpoint(tmp_path / "base", b), write_checkpoint(tmp_path / "instruct", i)
    with pytest.raises(DataError, match="tensor `w`: 100 merged weights do not fit into float16"):
        merge(*folders, 1.5, tmp_path / "out", dtype="float16")


def test_integers_are_copied_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "w": torch.ones(3),
        "table": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "d": torch.ones(2).double(),
    }
    base = write_checkpoint(tmp_path / "base", tensors)
    merge(
        base, write_checkpoint(tmp_path / "same", tensors), 0.3, tmp_path / "out", dtype="bfloat16"
    )
    merged = load_folder(tmp_path / "out")
    assert all(same_bits(merged[name], tensors[name]) for name in ("table", "mask", "d"))
    other = write_checkpoint(tmp_path / "other", tensors | {"table": torch.arange(5) + 1})
    with pytest.raises(DataError, match="tensor `table` of I64 differs between base and instruct"):
        merge(base, other, 0.3, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path)

    def touch(done: int, total: int) -> None:
        os.utime(base / "model.safetensors", ns=(1, 1))

    with pytest.raises(DataError, match="changed while it was read"):
        merge(base, instruct, 0.3, tmp_path / "out", progress=touch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "instruct"]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = merge(
        *write_pair(tmp_path),
        0.3,
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] < report.bytes
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    "wrong", [{"lam": "abc"}, {"lam": float("nan")}, {"dtype": "int8"}, {"max_shard_size": "0"}]
)
def test_wrong_usage(tmp_path: Path, wrong: dict[str, Any]) -> None:
    base, instruct = write_pair(tmp_path)
    with pytest.raises(UsageError):
        merge(base, instruct, **{"lam": 0.5, "out": tmp_path / "out", **wrong})


@pytest.mark.parametrize("target", ["base", "instruct", ".", "base/merged"])
def test_a_source_is_never_overwritten(tmp_path: Path, target: str) -> None:
    base, instruct = write_pair(tmp_path)
    with pytest.raises(OutputError, match="is, holds or lies in the source"):
        merge(base, instruct, 0.5, tmp_path / target, overwrite=True)
    assert load_folder(base) and load_folder(instruct)


def test_a_pair_that_does_not_match_leaves_no_output(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": torch.zeros(2)})
    with pytest.raises(PairError):
        merge(
            base,
            write_checkpoint(tmp_path / "instruct", {"w": torch.zeros(3)}),
            0.5,
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_torch_threads_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge(*write_pair(tmp_path), 0.3, tmp_path / "out")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("longer", ["base", "instruct"])
def test_a_weight_that_is_not_finite_is_named_by_the_file_that_holds_it_in_a_row_of_one_side_too(
    tmp_path: Path, longer: str
) -> None:
    for side in ("base", "instruct"):
        rows = 48 if side == longer else 40
        tensors = random_tensors(torch.bfloat16) | {
            "model.embed_tokens.weight": torch.ones(rows, 16).bfloat16()
        }
        if side == longer:
            tensors["model.embed_tokens.weight"][44, 3] = torch.nan
        write_checkpoint(
            tmp_path / side,
            tensors,
            config={**CONFIG, "vocab_size": rows},
            tokenizer={"model": {"vocab": {"a": 0}}},
        )
    with pytest.raises(
        DataError,
        match=rf"{longer}/model.*: tensor `model.embed_tokens.weight` of {longer} has non-finite",
    ):
        merge(tmp_path / "base", tmp_path / "instruct", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
