"""mergekit's merge of state dicts in memory, copied into live tensors: `python in_memory.py BASE
INSTRUCT`. Each λ on stdin is answered by a line of JSON on stdout.

`seconds` are wall and processor seconds of `merge_state_dicts` and `copy_`; `wrong_share`, looked
at after them where a line ends with `?`, is the share of the weights that are not `torch.lerp`'s.
"""

import json
import pathlib
import sys
import time

import torch
from mergekit.merge_methods import BatchOptions, merge_state_dicts
from safetensors.torch import load_file


def state_dict(folder: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for file in sorted(pathlib.Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def wrong_share(lam: float) -> float:
    """Bits are compared, as 16-bit integers."""
    wrong = sum(
        int(
            (
                live[name].view(torch.int16) != torch.lerp(b, instruct[name], lam).view(torch.int16)
            ).sum()
        )
        for name, b in base.items()
    )
    return wrong / sum(b.numel() for b in base.values())


base, instruct = map(state_dict, sys.argv[1:3])
live = {name: tensor.clone() for name, tensor in base.items()}
print("ready", flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        lam = float(line.removesuffix("?\n"))
        began, used = time.perf_counter(), time.process_time()
        merged = merge_state_dicts(
            [base, instruct],
            "linear",
            parameters={"weight": [1 - lam, lam], "normalize": False},
            out_dtype=torch.bfloat16,
            # a tensor at a time: its default of 64 MB takes five times as long here
            batch_options=BatchOptions(max_bytes=2**20),
        )
        for name, tensor in merged.items():
            live[name].copy_(tensor)
        del merged
        answer = {"seconds": [time.perf_counter() - began, time.process_time() - used]}
        if line.endswith("?\n"):
            answer["wrong_share"] = wrong_share(lam)
        print(json.dumps(answer), flush=True)
