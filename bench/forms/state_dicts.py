"""`python state_dicts.py BASE.safetensors INSTRUCT.safetensors λ OUT`: mergekit's merge of state
dicts in memory between `load_file` and `save_file`."""

import pathlib
import sys

import torch
from mergekit.merge_methods import BatchOptions, merge_state_dicts
from safetensors.torch import load_file, save_file

base, instruct, lam, out = sys.argv[1:]
pathlib.Path(out).mkdir()
with torch.inference_mode():
    merged = merge_state_dicts(
        [load_file(base), load_file(instruct)],
        "linear",
        parameters={"weight": [1 - float(lam), float(lam)], "normalize": False},
        out_dtype=torch.bfloat16,
        # a tensor at a time, as in in_memory.py
        batch_options=BatchOptions(max_bytes=2**20),
    )
save_file(merged, f"{out}/model.safetensors", {"format": "pt"})
