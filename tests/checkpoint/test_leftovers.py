"""What people's folders really hold, pointers, leftovers, cache folders: each says what it is and
what mends it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pa_fast
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import CheckpointError
from tests.checkpoint.pairs import write_checkpoint

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 4976698672\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors = {f"layer.{n}.weight": torch.randn(8, 8, generator=g).bfloat16() for n in range(4)}
    return write_checkpoint(tmp_path / "one", tensors)


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    return error.value


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_named_as_one(folder: Path, file: str) -> None:
    (folder / file).write_text(POINTER)
    error = refused(folder)
    assert str(folder / file) in error.message
    assert "a git-lfs pointer for a file of 4.98 GB" in error.message
    assert error.hint == f"install git-lfs, then: git -C {shlex.quote(str(folder))} lfs pull"


def test_a_configuration_of_quantisation_beside_plain_weights_is_to_be_removed(
    folder: Path,
) -> None:
    config = json.loads((folder / "config.json").read_text())
    for changed in (
        config | {"quantization_config": {"quant_method": "fp8"}},
        config | {"text_config": {"quantization_config": {}}},
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        error = refused(folder)
        assert "the weights are not quantised: all are plain BF16" in error.message
        assert error.hint is not None
        assert "remove `" in error.hint
        assert "quantization_config` from " in error.hint


def test_codes_are_refused_as_codes_whatever_the_configuration_says(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"layer.0.qweight": torch.zeros(4, dtype=torch.int32)},
        folder / "model.safetensors",
    )
    for method in ({}, {"quantization_config": {"quant_method": "gptq"}}):
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | method)
        )
        error = refused(folder)
        assert "a quantised checkpoint: tensor `layer.0.qweight`" in error.message


def test_a_tensor_in_two_shards_is_named_with_both(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    first, second = names[:2], names[1:]
    save_file({name: tensors[name] for name in first}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in second}, folder / "model-00002-of-00002.safetensors")
    where = dict.fromkeys(second, "model-00002-of-00002.safetensors") | dict.fromkeys(
        first, "model-00001-of-00002.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    error = refused(folder)
    assert (
        "tensor `layer.1.weight` is in two shards, model-00001-of-00002.safetensors and model-00002"
        in error.message
    )
    assert error.hint is not None
    assert "save_pretrained" in error.hint


def test_consolidated_weights_alone_are_said_to_be_of_another_layout(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.00.safetensors")
    error = refused(folder)
    assert "consolidated.00.safetensors alone" in error.message
    assert error.hint is not None
    assert "model*.safetensors" in error.hint


def test_the_folder_above_checkpoints_names_them(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "out" / "checkpoint-500")
    (tmp_path / "out" / "logs").mkdir()
    error = refused(tmp_path / "out")
    assert error.message.endswith(", but checkpoints in checkpoint-500")
    assert error.hint == f"give one of these, such as {tmp_path / 'out' / 'checkpoint-500'}"


def test_a_cache_folder_is_said_to_hold_snapshots(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.move(folder, snapshot)
    error = refused(cache)
    assert "the cache folder of a hub repository, whose checkpoints are in" in error.message
    assert error.hint == f"give {snapshot}, or the hub id acme/tiny"
    for name in ("snapshots", "blobs", "refs"):
        (cache / name).mkdir(exist_ok=True)
        error = refused(cache / name)
        assert f"the {name} in the cache folder of a hub repository" in error.message
        assert error.hint == f"give {snapshot}, or the hub id acme/tiny"
    for place in (tmp_path, tmp_path / "home"):
        if place != tmp_path:
            place.mkdir()
            (place / "hub").symlink_to(tmp_path)
        error = refused(place)
        assert "a cache of hub repositories" in error.message
        assert (error.hint or "").endswith("/0, or the hub id acme/tiny".replace("0", "0" * 40))
    shutil.copytree(cache, tmp_path / "models--acme--other")
    assert (refused(tmp_path).hint or "").endswith(", or a hub id: acme/other, acme/tiny")
    shutil.rmtree(tmp_path / "models--acme--other")
    with Checkpoint.open(snapshot):
        pass
    assert pa_fast.inspect(snapshot, snapshot) is not None
