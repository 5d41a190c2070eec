"""The script that people write: `python naive.py BASE INSTRUCT λ OUT`, b + λ (i − b) in bf16 on two
loaded models."""

import sys

import torch
from transformers import AutoModelForCausalLM

base, instruct, lam, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
other = AutoModelForCausalLM.from_pretrained(
    instruct, dtype=torch.bfloat16, trust_remote_code=False
).state_dict()
with torch.no_grad():
    for name, b in model.state_dict().items():
        b.copy_(b + float(lam) * (other[name] - b))
model.save_pretrained(out)
