"""Tiny random pairs of many architectures, made from transformers configurations."""

from __future__ import annotations

import pathlib
from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "decoder_sparse_step": 1,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 16, **EXPERTS}),
    "gemma-2": ("Gemma2Config", {"head_dim": 16}),
    "gemma-3": ("Gemma3TextConfig", {"head_dim": 16}),
    "olmo-2": ("Olmo2Config", {}),
    "phi-3": ("Phi3Config", {}),
    "gpt-2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128},
    ),
    "gpt-neox": ("GPTNeoXConfig", {}),
}


def config(name: str, **changes: Any) -> Any:
    import transformers

    kind, own = ARCHITECTURES[name]
    shape = (
        {k: v for k, v in SMALL.items() if k in ("pad_token_id", "bos_token_id", "eos_token_id")}
        if name == "gpt-2"
        else SMALL
    )
    return getattr(transformers, kind)(**{**shape, **own, **changes})


def write_model(
    folder: pathlib.Path,
    name: str,
    seed: int,
    dtype: str = "bfloat16",
    shard: str = "40KB",
    **changes: Any,
) -> None:
    """A random model of architecture `name` at `folder`, norms and biases included."""
    import torch

    key = repr((name, seed, dtype, shard, sorted(changes.items())))
    if key not in _WRITTEN:
        _write(folder, name, seed, dtype, shard, changes)
        files = {path.name: path for path in folder.iterdir() if path.is_file()}
        if sum(path.stat().st_size for path in files.values()) < _SMALL_BYTES:
            written = {file: path.read_bytes() for file, path in files.items()}
            _WRITTEN[key] = written, torch.get_rng_state()
        return
    written, state = _WRITTEN[key]
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in written.items():
        (folder / file).write_bytes(content)
    torch.set_rng_state(state)  # whoever draws next gets the same, first written or not


_WRITTEN: dict[str, tuple[dict[str, bytes], Any]] = {}
"""The files of models that this process has written, and what the generator was left at."""

_SMALL_BYTES = 4_000_000


def _write(
    folder: pathlib.Path, name: str, seed: int, dtype: str, shard: str, changes: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).mul_(0.02).to(parameter.dtype))
    model.save_pretrained(folder, max_shard_size=shard)


def write_pair(
    folder: pathlib.Path, name: str, **changes: Any
) -> tuple[pathlib.Path, pathlib.Path]:
    """Base and instruct folders below `folder`, sharded differently."""
    write_model(folder / "base", name, seed=1, shard="40KB", **changes)
    write_model(folder / "instruct", name, seed=2, shard="70KB", **changes)
    return folder / "base", folder / "instruct"
