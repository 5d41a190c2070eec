"""As little as it takes: `python lerp.py BASE.safetensors INSTRUCT.safetensors λ OUT`, `torch.lerp`
tensor by tensor."""

import pathlib
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

base, instruct, lam, out = sys.argv[1:]
pathlib.Path(out).mkdir()
with safe_open(base, "pt") as b, safe_open(instruct, "pt") as i:
    names = list(b.keys())
    merged = {
        name: torch.lerp(b.get_tensor(name), i.get_tensor(name), float(lam)) for name in names
    }
save_file(merged, f"{out}/model.safetensors", {"format": "pt"})
