"""Synthetic Llama pairs of a given size, for timing: random weights, and an instruct side a small
Gaussian step away."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from pa_kernels.cores import over_cores

from pa_fast.checkpoint.folder import INDEX
from pa_fast.checkpoint.layout import ShardPlan, plan_shards
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.checkpoint.streaming import cuts
from pa_fast.checkpoint.writer import ShardFile

SIZES = {
    "tiny": (64, 160, 2, 1, 1, 512),
    "100m": (768, 2048, 12, 12, 12, 16000),
    "300m": (1024, 2816, 18, 16, 16, 32000),
    "1b": (2048, 5632, 18, 32, 8, 32000),
    "3b": (3072, 8192, 26, 24, 8, 64000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}
"""hidden, intermediate, layers, heads, key-value heads, vocabulary."""
SHARD_BYTES = {"base": 500 * 2**20, "instruct": 700 * 2**20}
"""Cut at different places, as the shards of real pairs are."""
PIECE = 2**20


def write_pair(
    folder: pathlib.Path, size: str, relative_delta: float = 0.02
) -> tuple[pathlib.Path, pathlib.Path]:
    """Base and instruct folders below `folder`, bf16.

    Every weight is drawn from N(0, 0.02), those of norms around 1; instruct adds a step of
    `relative_delta` of that, drawn alike. The same size gives the same bytes, whatever the number
    of cores.

    Cost: 30 bytes of scratch for 2^20 weights on each core.
    """
    rows = [(name, "BF16", shape, math.prod(shape)) for name, shape in shapes(size)]
    with ExitStack() as open_files:
        sides = [
            _side(folder / side, config(size), plan_shards(rows, limit), open_files)
            for side, limit in SHARD_BYTES.items()
        ]

        def draw(piece: tuple[int, int]) -> None:
            number, start = piece
            name, _, shape, count = rows[number]
            some = min(PIECE, count - start)
            generator = torch.Generator().manual_seed(number << 32 | start)
            b = torch.randn(some, generator=generator).mul_(0.02 if len(shape) > 1 else 0.05)
            b = b.add_(float(len(shape) == 1)).bfloat16()
            i = (
                torch.randn(some, generator=generator)
                .mul_(0.02 * relative_delta)
                .add_(b)
                .bfloat16()
            )
            for side, values in zip(sides, (b, i)):
                side[name].write(name, start, values)

        over_cores(
            draw, [(n, start) for n, row in enumerate(rows) for start in range(0, row[3], PIECE)]
        )
    return folder / "base", folder / "instruct"


@contextmanager
def pair_of(
    folder: pathlib.Path, size: str, relative_delta: float = 0.02
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """`write_pair`, and the whole of `folder` removed at the end: pytest keeps what tests leave,
    and a 3B round has 25 GB."""
    try:
        yield write_pair(folder, size, relative_delta)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def config(size: str) -> dict[str, object]:
    """config.json of a Llama of that size."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "rope_theta": 10000.0,
    }


def shapes(size: str) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the files."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    kv = hidden // heads * kv_heads
    layer: list[tuple[str, tuple[int, ...]]] = [
        (f"self_attn.{p}_proj.weight", (rows, hidden))
        for p, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))
    ]
    layer += [(f"mlp.{p}_proj.weight", (intermediate, hidden)) for p in ("gate", "up")]
    layer += [("mlp.down_proj.weight", (hidden, intermediate))]
    layer += [(f"{p}_layernorm.weight", (hidden,)) for p in ("input", "post_attention")]
    inside = [(f"model.layers.{n}.{name}", shape) for n in range(layers) for name, shape in layer]
    return [
        ("model.embed_tokens.weight", (vocabulary, hidden)),
        *inside,
        ("model.norm.weight", (hidden,)),
        ("lm_head.weight", (vocabulary, hidden)),
    ]


def _side(
    folder: pathlib.Path, config: dict[str, object], plans: list[ShardPlan], open_files: ExitStack
) -> dict[str, ShardFile]:
    """The files of one side, open, by the tensor that goes into each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(plans) > 1:
        weight_map = {slot.name: plan.file for plan in plans for slot in plan.slots}
        total = sum(slot.stop - slot.start for plan in plans for slot in plan.slots)
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    found: dict[str, ShardFile] = {}
    for plan in plans:
        file = ShardFile(folder / plan.file, plan)
        open_files.callback(file.close)
        found |= {slot.name: file for slot in plan.slots}
    return found


def read_into_memory(*sides: Checkpoint) -> None:
    """Read every tensor of `sides` once, over all cores, by the reader that merges use: the floor
    of what loads, encodes or merges them."""
    for side in sides:
        held = {
            name: torch.empty(info.count, dtype=torch_dtype(info.dtype))
            for name, info in side.tensors.items()
        }
        pieces = [(name, *cut) for name, info in side.tensors.items() for cut in cuts(info.count)]
        over_cores(
            lambda at, side=side, held=held: side.chunk(*at, held[at[0]][at[1] : at[2]]), pieces
        )  # type: ignore[misc]


def weight_count(*sides: Checkpoint) -> int:
    return sum(info.count for side in sides for info in side.tensors.values())
