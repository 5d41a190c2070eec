"""Which two checkpoints are one model, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pa_fast.checkpoint.config import differences
from pa_fast.checkpoint.pair import Pair, PairOptions, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import PairError, UsageError
from tests.checkpoint.pairs import CONFIG, SHAPES, random_tensors, same_bits, write_checkpoint

SIDES = ("base", "instruct")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def paired(
    root: Path, base: dict[str, torch.Tensor], instruct: dict[str, torch.Tensor], /, **configs: Any
) -> Pair:
    left = write_checkpoint(root / "base", base, config={**CONFIG, **configs.get("base", {})})
    right = write_checkpoint(
        root / "instruct", instruct, shards=2, config={**CONFIG, **configs.get("instruct", {})}
    )
    return pair(Checkpoint.open(left), Checkpoint.open(right))


def with_rows(
    root: Path,
    base: int,
    instruct: int,
    extra_rows: str = "instruct",
    tokens: Any = ({"a": 0}, {"a": 0}),
) -> Pair:
    """A pair of as many vocabulary rows; base is fp32 and instruct bf16."""
    folders = []
    for side, rows, dtype, vocabulary in zip(
        SIDES, (base, instruct), (torch.float32, torch.bfloat16), tokens
    ):
        generator = torch.Generator().manual_seed(rows)
        tensors = random_tensors(dtype) | {
            EMBEDDING: torch.randn(rows, 16, generator=generator).to(dtype)
        }
        tokenizer = None if vocabulary is None else {"model": {"vocab": vocabulary}}
        folders.append(
            write_checkpoint(
                root / side, tensors, config={**CONFIG, "vocab_size": rows}, tokenizer=tokenizer
            )
        )
    return pair(
        Checkpoint.open(folders[0]), Checkpoint.open(folders[1]), PairOptions.of(extra_rows)
    )


def test_pairs_by_name_whatever_the_shards(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    found = paired(tmp_path, tensors, dict(reversed(tensors.items())))
    assert set(found.names) == set(tensors)
    assert [str(found.instruct.tensors[name].file) for name in found.names] == sorted(
        str(found.instruct.tensors[name].file) for name in found.names
    ), "names follow instruct's files, so that it is read in order"


@pytest.mark.parametrize("side", SIDES)
def test_a_name_on_one_side_only(tmp_path: Path, side: str) -> None:
    both = {"base": random_tensors(torch.bfloat16), "instruct": random_tensors(torch.bfloat16)}
    both[side]["model.extra.weight"] = torch.zeros(2)
    with pytest.raises(PairError, match=f"lacks `model.extra.weight`, which only {side}"):
        paired(tmp_path, both["base"], both["instruct"])


@pytest.mark.parametrize("side", SIDES)
def test_a_head_tied_on_one_side_only_is_that_sides_embedding(tmp_path: Path, side: str) -> None:
    both = {s: random_tensors(torch.bfloat16, seed) for seed, s in enumerate(SIDES)}
    both["base" if side == "instruct" else "instruct"][HEAD] = torch.ones(40, 16).bfloat16()
    found = paired(
        tmp_path, both["base"], both["instruct"], **{side: {"tie_word_embeddings": True}}
    )
    assert set(found.names) == {*SHAPES, HEAD} and found.stored(side, HEAD).name == EMBEDDING
    assert torch.equal(found.chunk(side, HEAD, 3, 50), both[side][EMBEDDING].view(-1)[3:50])
    assert f"`{HEAD}` is tied in {side} only: the merge has a head of its own" in found.notes


def test_a_tie_that_both_sides_state_needs_no_class_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pa_fast.checkpoint.config._expanded", lambda _: pytest.fail("transformers was asked")
    )
    base = random_tensors(torch.bfloat16)
    instruct = base | {HEAD: torch.ones(40, 16).bfloat16()}
    found = paired(
        tmp_path,
        base,
        instruct,
        base={"tie_word_embeddings": True},
        instruct={"tie_word_embeddings": False},
    )
    assert found.tied and [(d.key, d.harmless) for d in found.differences] == [
        ("tie_word_embeddings", True)
    ]


@pytest.mark.parametrize(
    ("ties", "lacks", "message"),
    [
        ((False, False), "base", "lacks `lm_head.weight`, and its config.json does not tie it"),
    ],
)
def test_a_tie_that_contradicts_the_files(
    tmp_path: Path, ties: tuple[bool, bool], lacks: str, message: str
) -> None:
    head = {HEAD: torch.zeros(40, 16).bfloat16()}
    base = random_tensors(torch.bfloat16) | ({} if lacks == "base" else head)
    sides = {side: {"tie_word_embeddings": tie} for side, tie in zip(SIDES, ties)}
    with pytest.raises(PairError, match=message):
        paired(tmp_path, base, random_tensors(torch.bfloat16) | head, **sides)


def test_a_tied_head_whose_embedding_cannot_be_told(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16) | {"another.weight": torch.zeros(40, 16).bfloat16()}
    with pytest.raises(
        PairError,
        match=r"expected one embedding of shape \[40, 16\], found `another.weight`, `model.embed",
    ):
        paired(
            tmp_path,
            tensors,
            tensors | {HEAD: torch.zeros(40, 16).bfloat16()},
            base={"tie_word_embeddings": True},
        )


@pytest.mark.parametrize("rows", [(40, 48), (48, 40)])
def test_extra_vocabulary_rows_are_kept(tmp_path: Path, rows: tuple[int, int]) -> None:
    found = with_rows(tmp_path, *rows)
    longer, shorter = ("base", "instruct") if rows[0] > rows[1] else ("instruct", "base")
    assert found.shapes[EMBEDDING] == (48, 16)
    assert (
        f"rows 40 to 47 of `{EMBEDDING}`: in {longer} only, kept as they are at every λ"
        in found.notes
    )
    whole = found.chunk(longer, EMBEDDING, 0, 48 * 16)
    assert same_bits(found.checkpoint(longer).tensor(EMBEDDING).view(-1), whole)
    own = found.checkpoint(shorter).tensor(EMBEDDING).view(-1).float()
    for start, stop in ((0, 640), (0, 768), (600, 700), (640, 641), (700, 768), (640, 640)):
        expected = torch.cat([own, whole[640:].float()])[start:stop]
        assert torch.equal(found.chunk(shorter, EMBEDDING, start, stop).float(), expected), (
            start,
            stop,
        )
        part = found.own_part(
            shorter, EMBEDDING, start, found.chunk(shorter, EMBEDDING, start, stop)
        )
        assert torch.equal(part.float(), own[start:stop])


def test_extra_vocabulary_rows_are_refused_when_asked(tmp_path: Path) -> None:
    with pytest.raises(
        PairError,
        match=r"embed_tokens.weight`: 40 vocabulary rows in base and 48 in instruct, expected as",
    ):
        with_rows(tmp_path, 40, 48, extra_rows="refuse")
    with pytest.raises(UsageError, match=r"extra rows `drop`: expected instruct or refuse"):
        with_rows(tmp_path / "more", 40, 40, extra_rows="drop")


def test_extra_rows_need_token_ids_that_can_be_compared(tmp_path: Path) -> None:
    with pytest.raises(
        PairError, match=r"no tokenizer.json in .*instruct: .* ids cannot be compared"
    ):
        with_rows(tmp_path, 40, 48, tokens=({"a": 0}, None))


def test_a_shifted_vocabulary_is_refused(tmp_path: Path) -> None:
    base = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "a": 4}
    instruct = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "<0x00>": 5, "a": 6}
    with pytest.raises(
        PairError, match=r"2 tokens have different ids: `<0x00>` is id 3 in base and 5 in instruct"
    ):
        with_rows(tmp_path, 40, 48, tokens=(base, instruct))


def test_rows_that_no_config_states_are_another_shape(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    more = tensors | {EMBEDDING: torch.zeros(48, 16, dtype=torch.bfloat16)}
    with pytest.raises(
        PairError,
        match=r"embed_tokens.weight`: shape \[40, 16\] in base and \[48, 16\] in instruct",
    ) as error:
        paired(tmp_path, tensors, more)
    assert "vocab_size" in str(error.value.hint)


def test_mixed_floats_pair_and_other_mixes_do_not(tmp_path: Path) -> None:
    found = paired(tmp_path / "a", random_tensors(torch.float32), random_tensors(torch.float16))
    assert all(found.is_lerped(name) for name in found.names)
    with pytest.raises(PairError, match="dtype F64 in base and F32 in instruct"):
        paired(tmp_path / "b", {"x": torch.zeros(2).double()}, {"x": torch.zeros(2)})


def test_integers_are_paired_but_not_lerped(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(2), "table": torch.arange(4)}
    found = paired(tmp_path, tensors, tensors)
    assert not found.is_lerped("table") and found.is_lerped("x")
    assert "1 tensor is not of a merged dtype" in found.notes[0]


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        (
            {"torch_dtype": "float32", "eos_token_id": 1},
            {"torch_dtype": "bfloat16", "eos_token_id": [1, 2]},
        ),
        (
            {"max_position_embeddings": 131072},
            {"max_position_embeddings": 32768},
        ),  # Qwen2.5-7B, Qwen3
        (
            {"use_cache": False, "transformers_version": "4.43.0"},
            {"use_cache": True, "_name_or_path": "x"},
        ),
        (  # Qwen2.5-0.5B
            {"use_sliding_window": False, "max_window_layers": 24},
            {"use_sliding_window": False, "max_window_layers": 21, "attention_dropout": 0.0},
        ),
        ({"vocab_size": 40}, {"vocab_size": 41}),
    ],
)
def test_harmless_differences_pass_and_are_reported(
    tmp_path: Path, base: dict[str, Any], instruct: dict[str, Any]
) -> None:
    tensors = random_tensors(torch.bfloat16)
    found = paired(tmp_path, tensors, tensors, base=base, instruct=instruct)
    assert {difference.key for difference in found.differences} >= {
        k for k in base if base[k] != instruct.get(k)
    }


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
        ({"text_config": {"head_dim": 8}}, {"text_config": {"head_dim": 4}}),
        (
            {
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            },
            {
                "max_position_embeddings": 200,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            },
        ),
    ],
)
def test_differences_that_change_the_function_are_refused(
    tmp_path: Path, base: dict[str, Any], instruct: dict[str, Any]
) -> None:
    tensors = random_tensors(torch.bfloat16)
    with pytest.raises(
        PairError, match=r"config.json changes the model: .* in base and .* in instruct"
    ):
        paired(tmp_path, tensors, tensors, base=base, instruct=instruct)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}},
        ),
        (
            {"rope_theta": 10000.0},
            {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "head_dim": 8},
        ),
        (
            {"rope_theta": 10000.0, "rope_scaling": None},
            {"rope_theta": 10000.0, "num_key_value_heads": 2, "use_mrope": False},
        ),
    ],
)
def test_one_model_in_two_spellings_is_one_model(old: dict[str, Any], new: dict[str, Any]) -> None:
    common = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    found = differences({**common, **old}, {**common, **new})
    assert found and all(difference.harmless for difference in found)


def test_a_spelling_does_not_hide_a_difference() -> None:
    common = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    found = differences(
        {**common, "rope_theta": 500000.0}, {**common, "rope_parameters": {"rope_theta": 10000.0}}
    )
    assert [d.key for d in found if not d.harmless] == ["rope_parameters.rope_theta"]


def test_what_the_user_ignores_is_not_called_harmless() -> None:
    common = {**CONFIG, "hidden_act": "silu", "transformers_version": "5.0"}
    other = {**common, "hidden_act": "gelu", "transformers_version": "5.1"}
    found = differences(common, other, ignored=["hidden_act"])
    assert [(d.key, d.harmless, d.ignored) for d in found] == [
        ("hidden_act", False, True),
        ("transformers_version", True, False),
    ]
    assert [d.reason for d in found] == ["ignored on request (--ignore-config)", ""]
    # beside a key that has to be expanded: one model in two spellings stays harmless
    spelled = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    old = {**spelled, "rope_theta": 10000.0, "hidden_act": "silu", "head_dim": 8}
    new = {**spelled, "rope_parameters": {"rope_theta": 10000.0}, "hidden_act": "gelu"}
    found = differences(old, new, ignored=["hidden_act", "head_dim"])
    told = {d.key: (d.harmless, d.ignored, bool(d.reason)) for d in found}
    assert told["hidden_act"] == (False, True, True)
    assert told["head_dim"] == (True, False, False), "8 is what the class takes by default"
    assert told["rope_theta"] == (True, False, False) and all(d.is_accepted for d in found)


def test_a_hostile_layer_count_is_not_expanded() -> None:
    found = differences(
        {**CONFIG, "num_hidden_layers": 10**12, "x": 1},
        {**CONFIG, "num_hidden_layers": 10**12, "x": 2},
    )
    assert [d.key for d in found if not d.harmless] == ["x"]


@pytest.mark.parametrize(
    ("count", "why", "hint", "note"),
    [
        (1, "has no place for it", "keep writes it as it is", "kept as it is at every λ"),
        (2, "has no place for them", "keep writes them as they are", "kept as they are at every λ"),
    ],
)
def test_one_tensor_is_it_and_several_are_them(
    tmp_path: Path, count: int, why: str, hint: str, note: str
) -> None:
    tensors = random_tensors(torch.bfloat16)
    more = tensors | {f"mtp.{n}.weight": torch.zeros(2).bfloat16() for n in range(count)}
    left = write_checkpoint(tmp_path / "base", tensors, config=CONFIG)
    right = write_checkpoint(tmp_path / "instruct", more, config=CONFIG)
    with Checkpoint.open(left) as base, Checkpoint.open(right) as instruct:
        with pytest.raises(PairError, match=why) as error:
            pair(base, instruct)
        assert hint in str(error.value.hint)
        (said,) = [
            one
            for one in pair(base, instruct, PairOptions.of(one_sided="keep")).notes
            if "mtp" in one
        ]
        assert why in said and note in said
