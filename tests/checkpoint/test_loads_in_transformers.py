"""A merged folder is one that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from pa_kernels import reference

from pa_fast.checkpoint.merge import merge


def test_a_merged_llama_loads_with_the_merged_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    models = []
    for side, shard in (("base", "20KB"), ("instruct", "40KB")):
        torch.manual_seed(len(models))
        models.append(LlamaForCausalLM(config).to(torch.bfloat16))
        models[-1].save_pretrained(tmp_path / side, max_shard_size=shard)
    merge(tmp_path / "base", tmp_path / "instruct", 0.3, tmp_path / "out", max_shard_size="30KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    base, instruct = (dict(model.named_parameters()) for model in models)
    found = dict(loaded.named_parameters())
    assert found.keys() == base.keys()
    for name, weight in found.items():
        assert torch.equal(weight, reference.lerp(base[name], instruct[name], 0.3)), name
