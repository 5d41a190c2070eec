"""`python mecha.py BASE.safetensors INSTRUCT.safetensors λ OUT` in sd-mecha's environment: fp32
arithmetic, bf16 written."""

import pathlib
import sys

import sd_mecha
import torch

base, instruct, lam, out = sys.argv[1:]
pathlib.Path(out).mkdir()
recipe = sd_mecha.weighted_sum(sd_mecha.model(base), sd_mecha.model(instruct), alpha=float(lam))
sd_mecha.merge(
    recipe,
    merge_dtype=torch.float32,
    output_dtype=torch.bfloat16,
    output=pathlib.Path(out) / "model.safetensors",
)
