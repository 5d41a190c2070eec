"""Which two checkpoints are one model, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pa_fast.checkpoint.config import differences
from pa_fast.checkpoint.pairing import Pair, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import PairError
from tests.checkpoint.pairs import CONFIG, random_tensors, write_checkpoint

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def paired(root: Path, base: dict[str, torch.Tensor], instruct: dict[str, torch.Tensor], /, **configs: Any) -> Pair:
    left = write_checkpoint(root / "base", base, config={**CONFIG, **configs.get("base", {})})
    right = write_checkpoint(root / "instruct", instruct, shards=2, config={**CONFIG, **configs.get("instruct", {})})
    return pair(Checkpoint.open(left), Checkpoint.open(right))


def test_pairs_by_name_whatever_the_shards(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    found = paired(tmp_path, tensors, dict(reversed(tensors.items())))
    assert set(found.names) == set(tensors)
    assert [str(found.instruct.tensors[name].file) for name in found.names] == sorted(
        str(found.instruct.tensors[name].file) for name in found.names
    ), "names follow instruct's files, so that it is read in order"


@pytest.mark.parametrize("side", ["base", "instruct"])
def test_a_name_on_one_side_only(tmp_path: Path, side: str) -> None:
    both = {"base": random_tensors(torch.bfloat16), "instruct": random_tensors(torch.bfloat16)}
    both[side]["model.extra.weight"] = torch.zeros(2)
    with pytest.raises(PairError, match=f"lacks `model.extra.weight`, which only {side}"):
        paired(tmp_path, both["base"], both["instruct"])


def test_a_head_tied_on_one_side_only(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    with pytest.raises(PairError, match="output head is stored on one side only"):
        paired(tmp_path, tensors, tensors | {"lm_head.weight": torch.zeros(40, 16)})


def test_extra_vocabulary_rows(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    more = tensors | {"model.embed_tokens.weight": torch.zeros(48, 16, dtype=torch.bfloat16)}
    with pytest.raises(PairError, match=r"embed_tokens.weight`: shape \[40, 16\] in base and \[48, 16\] in instruct") as error:
        paired(tmp_path, tensors, more, instruct={"vocab_size": 48})
    assert "vocabulary rows" in str(error.value.hint)


def test_mixed_floats_pair_and_other_mixes_do_not(tmp_path: Path) -> None:
    found = paired(tmp_path / "a", random_tensors(torch.float32), random_tensors(torch.float16))
    assert all(found.is_lerped(name) for name in found.names)
    with pytest.raises(PairError, match="dtype F64 in base and F32 in instruct"):
        paired(tmp_path / "b", {"x": torch.zeros(2).double()}, {"x": torch.zeros(2)})


def test_integers_are_paired_but_not_lerped(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(2), "table": torch.arange(4)}
    found = paired(tmp_path, tensors, tensors)
    assert not found.is_lerped("table") and found.is_lerped("x")
    assert "1 tensors are not of a merged dtype" in found.notes[0]


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        ({"torch_dtype": "float32", "eos_token_id": 1}, {"torch_dtype": "bfloat16", "eos_token_id": [1, 2]}),
        ({"max_position_embeddings": 131072}, {"max_position_embeddings": 32768}),  # Qwen2.5-7B, Qwen3
        ({"use_cache": False, "transformers_version": "4.43.0"}, {"use_cache": True, "_name_or_path": "x"}),
        (  # Qwen2.5-0.5B
            {"use_sliding_window": False, "max_window_layers": 24},
            {"use_sliding_window": False, "max_window_layers": 21, "attention_dropout": 0.0},
        ),
        ({"vocab_size": 40}, {"vocab_size": 41}),
    ],
)
def test_harmless_differences_pass_and_are_reported(tmp_path: Path, base: dict[str, Any], instruct: dict[str, Any]) -> None:
    tensors = random_tensors(torch.bfloat16)
    found = paired(tmp_path, tensors, tensors, base=base, instruct=instruct)
    assert {difference.key for difference in found.differences} >= {k for k in base if base[k] != instruct.get(k)}


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        ({"rope_theta": 500000.0}, {"rope_theta": 1000000.0}),
        ({"num_attention_heads": 2}, {"num_attention_heads": 4}),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}),
        ({"sliding_window": 4096}, {"sliding_window": None}),
        ({"model_type": "llama"}, {"model_type": "qwen2"}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}}, {}),
        ({"unheard_of_key": 1}, {"unheard_of_key": 2}),
        ({"unheard_of_key": 1}, {}),
        ({"text_config": {"head_dim": 8}}, {"text_config": {"head_dim": 4}}),
        (
            {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"max_position_embeddings": 200, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        ),
    ],
)
def test_differences_that_change_the_function_are_refused(tmp_path: Path, base: dict[str, Any], instruct: dict[str, Any]) -> None:
    tensors = random_tensors(torch.bfloat16)
    with pytest.raises(PairError, match=r"config.json changes the model: .* in base and .* in instruct"):
        paired(tmp_path, tensors, tensors, base=base, instruct=instruct)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}},
        ),
        ({"rope_theta": 10000.0}, {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "head_dim": 8}),
        ({"rope_theta": 10000.0, "rope_scaling": None}, {"rope_theta": 10000.0, "num_key_value_heads": 2, "use_mrope": False}),
    ],
)
def test_one_model_in_two_spellings_is_one_model(old: dict[str, Any], new: dict[str, Any]) -> None:
    common = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    found = differences({**common, **old}, {**common, **new})
    assert found and all(difference.harmless for difference in found)


def test_a_spelling_does_not_hide_a_difference() -> None:
    common = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    found = differences({**common, "rope_theta": 500000.0}, {**common, "rope_parameters": {"rope_theta": 10000.0}})
    assert [d.key for d in found if not d.harmless] == ["rope_parameters.rope_theta"]


def test_a_hostile_layer_count_is_not_expanded() -> None:
    found = differences({**CONFIG, "num_hidden_layers": 10**12, "x": 1}, {**CONFIG, "num_hidden_layers": 10**12, "x": 2})
    assert [d.key for d in found if not d.harmless] == ["x"]
