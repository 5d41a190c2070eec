"""Tiny synthetic checkpoints, written by the safetensors library: what our own reader and writer
are tested against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.norm.weight": (16,),
    "a.odd": (7, 11, 3),
    "b.one": (),
    "c.none": (0, 4),
}
LAMBDAS = ["0", "0.05", "0.3", "0.5", "1/3", "0.999", "1", "-0.2", "1.5"]


def random_tensors(
    dtype: torch.dtype, seed: int = 0, near: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """One tensor of every shape in SHAPES; close to `near` where that is given, and equal to it in
    every tenth weight."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator)
        if near is not None:
            kept = torch.rand(shape, generator=generator) < 0.1
            value = torch.where(kept, near[name].float(), near[name].float() + 0.05 * value)
        found[name] = value.to(dtype)
    return found


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    shards: int = 1,
    config: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """A folder with `tensors` cut into `shards` files of about as many tensors each."""
    folder.mkdir(parents=True)
    names, weight_map = list(tensors), {}
    step = math.ceil(len(names) / shards)
    parts = [names[start : start + step] for start in range(0, len(names), step)]
    for number, part in enumerate(parts, 1):
        file = (
            "model.safetensors"
            if len(parts) == 1
            else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        )
        save_file(
            {name: tensors[name].contiguous() for name in part},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_pair(
    root: Path,
    base: torch.dtype = torch.bfloat16,
    instruct: torch.dtype = torch.bfloat16,
    shards: tuple[int, int] = (1, 1),
) -> tuple[Path, Path]:
    """A base and an instruct folder under `root`."""
    b = random_tensors(base, seed=1)
    i = random_tensors(instruct, seed=2, near=b)
    return write_checkpoint(root / "base", b, shards[0]), write_checkpoint(
        root / "instruct", i, shards[1]
    )


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
