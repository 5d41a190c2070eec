"""Synthetic Llama pairs of a given size, for timing: random weights, and an instruct side a small Gaussian step away."""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import save_file

SIZES = {
    "tiny": (64, 160, 2, 512),
    "100m": (768, 2048, 12, 16000),
    "300m": (1024, 2816, 18, 32000),
    "1b": (2048, 5632, 18, 32000),
}
"""hidden, intermediate, layers, vocabulary."""


def write_pair(folder: pathlib.Path, size: str, relative_delta: float = 0.02) -> tuple[pathlib.Path, pathlib.Path]:
    """Base and instruct folders below `folder`, bf16, one file per layer on one side and one in all on the other."""
    hidden, intermediate, layers, vocabulary = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sides: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for name, shape in _shapes(hidden, intermediate, layers, vocabulary):
        b = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        step = torch.randn(shape, generator=generator).mul_(0.02 * relative_delta)
        sides[0][name], sides[1][name] = b, step.add_(b).bfloat16()
    for side, tensors, cut in (("base", sides[0], True), ("instruct", sides[1], False)):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text(json.dumps(config))
        _save(folder / side, tensors, cut)
    return folder / "base", folder / "instruct"


def _shapes(hidden: int, intermediate: int, layers: int, vocabulary: int) -> list[tuple[str, tuple[int, ...]]]:
    layer: list[tuple[str, tuple[int, ...]]] = [(f"self_attn.{p}_proj.weight", (hidden, hidden)) for p in "qkvo"]
    layer += [(f"mlp.{p}_proj.weight", (intermediate, hidden)) for p in ("gate", "up")]
    layer += [("mlp.down_proj.weight", (hidden, intermediate))]
    layer += [(f"{p}_layernorm.weight", (hidden,)) for p in ("input", "post_attention")]
    inside = [(f"model.layers.{n}.{name}", shape) for n in range(layers) for name, shape in layer]
    outside: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (vocabulary, hidden)),
        ("model.norm.weight", (hidden,)),
    ]
    return outside + inside + [("lm_head.weight", (vocabulary, hidden))]


def _save(folder: pathlib.Path, tensors: dict[str, torch.Tensor], cut: bool) -> None:
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[2] if cut and ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors" if cut else "model.safetensors", {})[name] = tensor
    for file, held in files.items():
        save_file(held, folder / file, {"format": "pt"})
    if cut:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
