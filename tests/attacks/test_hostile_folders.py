"""Folders made to mislead: indexes that lie or lead outside, weights of other kinds, broken
companions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import CheckpointError

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good folder of two shards; the folder above it is outside."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / ONE)
    save_file({"b": torch.zeros(2)}, folder / TWO)
    save_file({"b": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO}}))
    (folder / "config.json").write_text("{}")
    return folder


def with_map(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


INDEXES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent folder": (
        lambda f: with_map(f, {"a": ONE, "b": "../outside.safetensors"}),
        "`../outside.safetensors`, expected",
    ),
    "absolute path": (
        lambda f: with_map(f, {"a": ONE, "b": str(f / TWO)}),
        "expected the plain name",
    ),
    "subfolder": (lambda f: with_map(f, {"a": ONE, "b": f"sub/{TWO}"}), "expected the plain name"),
    "backslashes": (
        lambda f: with_map(f, {"a": ONE, "b": "..\\outside.safetensors"}),
        "expected the plain name",
    ),
    "not safetensors": (
        lambda f: with_map(f, {"a": ONE, "b": "config.json"}),
        "expected the plain name",
    ),
    "zero byte": (
        lambda f: with_map(f, {"a": ONE, "b": "x\0.safetensors"}),
        "expected the plain name",
    ),
    "missing shard": (lambda f: (f / TWO).unlink(), f"1 of 2 shards are missing: {TWO}"),
    "broken link": (
        lambda f: ((f / TWO).unlink(), (f / TWO).symlink_to("gone")),
        f"1 of 2 shards are missing: {TWO}",
    ),
    "shard is a folder": (lambda f: ((f / TWO).unlink(), (f / TWO).mkdir()), "not a regular file"),
    "tensor in another shard": (
        lambda f: with_map(f, {"a": TWO, "b": ONE}),
        f"tensor `a` should be in {TWO}, which does not",
    ),
    "tensor nowhere": (
        lambda f: with_map(f, {"a": ONE, "b": TWO, "c": TWO}),
        f"tensor `c` should be in {TWO}",
    ),
    "tensor not named": (
        lambda f: save_file({"a": torch.zeros(2), "x": torch.zeros(1)}, f / ONE),
        f"shard {ONE} holds tensor `x`",
    ),
    "tensor in two shards": (
        lambda f: save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, f / ONE),
        f"tensor `b` is in two shards, {TWO}",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "`weight_map` is not an object"),
    "empty map": (lambda f: with_map(f, {}), "`weight_map` is not an object"),
    "map to numbers": (lambda f: with_map(f, {"a": 1}), "`weight_map` is not an object"),
    "a name twice": (
        lambda f: (f / INDEX).write_text(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'),
        "the name `a` appears twice",
    ),
    "not JSON": (lambda f: (f / INDEX).write_text("[" * 10), "not JSON"),
    "bomb": (lambda f: (f / INDEX).write_text("[" * 200_000), "nested too deep"),
    "a second set of weights": (
        lambda f: save_file({"a": torch.zeros(2)}, f / "model.safetensors"),
        "expected one of them",
    ),
    "no index": (
        lambda f: (f / INDEX).unlink(),
        "but neither model.safetensors nor model.safetensors.index.json",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be opened"),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "found JSON list, expected an object",
    ),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
}


@pytest.mark.parametrize("attack", INDEXES)
def test_refused(sharded: Path, attack: str) -> None:
    change, expected = INDEXES[attack]
    change(sharded)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(sharded)
    assert str(sharded) in error.value.message and expected in error.value.message
    assert error.value.hint


def test_the_good_folder_that_the_attacks_start_from_is_read(sharded: Path) -> None:
    assert set(Checkpoint.open(sharded).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config` of kind `fp8`"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "of kind `gptq`"),
        ({"quantization_config": {"quant_method": "awq"}}, "of kind `awq`"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "of kind `bitsandbytes`"),
        (
            {"text_config": {"quantization_config": {"quant_method": "fbgemm_fp8"}}},
            "of kind `fbgemm_fp8`",
        ),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            "of kind `compressed-tensors`",
        ),
    ],
)
def test_quantised_by_its_configuration(sharded: Path, config: dict[str, Any], kind: str) -> None:
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config.json has .* the weights are not quantised"
    ) as error:
        Checkpoint.open(sharded)
    assert kind in error.value.message and f"from {sharded / 'config.json'}" in str(
        error.value.hint
    )


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("q_proj.weight", torch.zeros(2).to(torch.float8_e4m3fn), "of F8_E4M3 holds fp8"),
        ("q_proj.weight_scale_inv", torch.zeros(2), "holds fp8"),
        ("q_proj.qweight", torch.zeros(2, dtype=torch.int32), "GPTQ or AWQ"),
        ("q_proj.weight", torch.zeros(2, dtype=torch.uint8), "integer codes"),
        ("q_proj.weight.quant_map", torch.zeros(2), "bitsandbytes 4-bit"),
        ("q_proj.SCB", torch.zeros(2), "bitsandbytes 8-bit"),
        ("q_proj.weight_packed", torch.zeros(2, dtype=torch.int32), "compressed-tensors"),
        ("mlp.experts.gate_up_proj_blocks", torch.zeros(2, dtype=torch.uint8), "mxfp4"),
        ("q_proj.W_q", torch.zeros(2, dtype=torch.uint8), "HQQ"),
        ("q_proj.codebooks", torch.zeros(2), "AQLM"),
    ],
)
def test_quantised_by_its_tensors(
    tmp_path: Path, name: str, tensor: torch.Tensor, kind: str
) -> None:
    save_file({name: tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"a quantised checkpoint: tensor `{name}`") as error:
        Checkpoint.open(tmp_path)
    assert kind in error.value.message


@pytest.mark.parametrize(
    ("files", "expected", "hint"),
    [
        ([], "the folder is empty", "check the path"),
        (["config.json"], "no weights", "check the path"),
        (
            ["config.json", "pytorch_model.bin"],
            "weights are pickle files only (pytorch_model.bin)",
            "save_pretrained",
        ),
        (["consolidated.00.pth"], "weights are pickle files only", "convert it first"),
        (
            ["model.Q4_K_M.gguf"],
            "found model.Q4_K_M.gguf, a quantised export",
            "original checkpoint",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "holds an adapter",
            "merge the adapter",
        ),
    ],
)
def test_folders_without_weights(
    tmp_path: Path, files: list[str], expected: str, hint: str
) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    assert expected in error.value.message and hint in str(error.value.hint)
