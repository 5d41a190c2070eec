"""Inspect (P8): a 70B-shaped pair of sparse files with true headers, whole process; and what a
fingerprint adds to it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from bench.cases import JOBS
from bench.table import record, timed
from pa_fast.checkpoint.reader import Checkpoint

CASE = JOBS["inspect"]
WITHOUT_TORCH = """
import sys
from pa_fast.cli import main
sys.argv[0] = "pa-fast"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch was imported"
"""
HIDDEN, INTERMEDIATE, LAYERS, KEYS, VOCABULARY, MERGES = 8192, 28672, 80, 1024, 128256, 280147
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_headers(folder: pathlib.Path, shards: int) -> pathlib.Path:
    """A folder of Llama-3-70B's shapes: true headers, and holes where the 141 GB of weights would
    be."""
    folder.mkdir()
    layered = {
        f"model.layers.{n}.{name}.weight": shape
        for n in range(LAYERS)
        for name, shape in LAYER.items()
    }
    embedding, norm, head = (VOCABULARY, HIDDEN), (HIDDEN,), (VOCABULARY, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": embedding,
        **layered,
        "model.norm.weight": norm,
    }
    names = [*shapes, "lm_head.weight"]
    shapes["lm_head.weight"] = head
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        entries, at = {}, 0
        for name in names[shard::shards]:
            size = 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            entries[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [at, at + size],
            }
            weight_map[name] = file
            at += size
        text = json.dumps(entries).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    # as many tokens and merges as the real one, and other bytes on the two sides, so that both are
    # parsed
    model = {
        "vocab": {f"token {n}": n for n in range(VOCABULARY)},
        "merges": [f"token {n}" for n in range(MERGES)],
    }
    document = {"version": folder.name, "added_tokens": [], "model": {"type": "BPE", **model}}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_inspect_of_a_70b_pair(benchmark: Any, tmp_path: pathlib.Path) -> None:
    base, instruct = write_headers(tmp_path / "base", 30), write_headers(tmp_path / "instruct", 17)
    assert sum(file.stat().st_size for file in base.glob("*.safetensors")) > 140e9
    pa_fast = str(pathlib.Path(sys.executable).with_name("pa-fast"))
    inspect = ["inspect", str(base), str(instruct)]
    run(sys.executable, "-c", WITHOUT_TORCH, *inspect)
    ways = {
        "pa-fast inspect": lambda: run(pa_fast, *inspect),
        "pa-fast inspect, again": lambda: run(pa_fast, *inspect),
        "pa-fast --help": lambda: run(pa_fast, "--help"),
    }
    whole, again, helped = timed(ways, CASE.rounds_here)
    with Checkpoint.open(base) as one:
        began = time.perf_counter()
        one.quick_fingerprint()
        fingerprint_s, tensors = time.perf_counter() - began, len(one.tensors)
    record(
        benchmark,
        CASE.target,
        f"inspect, 70B shapes: {tensors} tensors in 30 and 17 files, 2 × {VOCABULARY:,} tokens",
        [whole, again, helped],
        against=whole.name,
        goal=CASE.goal,
        noise=(whole.name, again.name),
        headline=(
            f"{whole.median_s:.2f} s, without torch (a fingerprint would add"
            f" {fingerprint_s * 1e3:.0f} ms a side)"
        ),
    )


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
