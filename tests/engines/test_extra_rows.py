"""Vocabularies of two sizes, and heads tied on one side: live weights, saved merges and the check
of them agree."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.errors import PairError
from pa_fast.run import SweepSpec, engine
from tests.engines.architectures import SMALL, write_model
from tests.engines.test_architectures import assert_same_bits, reload

TOKENIZER = pathlib.Path(__file__).parents[2] / "examples" / "demo" / "pair" / "instruct"
LAMBDAS = ("0", "0.3", "1", "-0.2")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def written(
    root: pathlib.Path,
    rows: tuple[int, int],
    ties: tuple[bool, bool] = (False, False),
    dtypes: tuple[str, str] = ("bfloat16",) * 2,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Base and instruct of so many rows, with one tokenizer."""
    folders = root / "base", root / "instruct"
    for seed, (folder, count, tie, dtype) in enumerate(zip(folders, rows, ties, dtypes)):
        write_model(folder, "llama", seed, dtype=dtype, vocab_size=count, tie_word_embeddings=tie)
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    return folders


@pytest.mark.parametrize(
    ("rows", "ties"),
    [
        ((128, 133), (False, False)),
        ((133, 128), (True, True)),
        ((128, 129), (True, False)),
        ((133, 128), (True, False)),
        ((133, 128), (False, True)),
    ],
)
def test_a_loaded_pair_equals_the_saved_merge(
    rows: tuple[int, int], ties: tuple[bool, bool], tmp_path: pathlib.Path
) -> None:
    base, instruct = written(tmp_path, rows, ties)
    lm = pa_fast.load(base, instruct, tokenizer=TOKENIZER)
    assert lm.model.config.vocab_size == len(lm.model.get_input_embeddings().weight) == max(rows)
    assert any("kept as they are at every λ" in note for note in lm.notes)
    for lam in LAMBDAS:
        lm.set_lambda(float(lam))
        report = pa_fast.merge(base, instruct, lam, tmp_path / lam)
        assert any("kept as they are at every λ" in note for note in report.notes)
        assert pa_fast.verify(tmp_path / lam, base, instruct).ok
        config = json.loads((tmp_path / lam / "config.json").read_text())
        assert (config["vocab_size"], config["tie_word_embeddings"]) == (
            max(rows),
            ties == (True, True),
        )
        assert_same_bits(lm.model.state_dict(), reload(tmp_path / lam))


def test_rows_of_one_side_are_that_sides_bits_at_every_lambda(tmp_path: pathlib.Path) -> None:
    base, instruct = written(tmp_path, (128, 133), dtypes=("float32", "bfloat16"))
    b, i = reload(base), reload(instruct)
    for lam in LAMBDAS:
        pa_fast.merge(base, instruct, lam, tmp_path / lam)
        merged = reload(tmp_path / lam)
        for name in (EMBEDDING, HEAD):
            assert torch.equal(merged[name][128:], i[name][128:])
            assert torch.equal(
                merged[name][:128],
                torch.lerp(b[name], i[name][:128].float(), float(lam)).bfloat16(),
            )


@pytest.mark.parametrize("tied", ["base", "instruct"])
def test_a_head_tied_on_one_side_is_written_as_its_own(tied: str, tmp_path: pathlib.Path) -> None:
    base, instruct = written(
        tmp_path, (128, 128), (tied == "base", tied == "instruct"), ("float32", "bfloat16")
    )
    lm = pa_fast.load(base, instruct, tokenizer=TOKENIZER)
    for lam in LAMBDAS:
        lm.set_lambda(float(lam))
        report = pa_fast.merge(base, instruct, lam, tmp_path / lam)
        assert f"`{HEAD}` is tied in {tied} only: the merge has a head of its own" in report.notes
        assert pa_fast.verify(tmp_path / lam, base, instruct).ok
        merged = reload(tmp_path / lam)
        assert_same_bits(lm.model.state_dict(), merged)
        assert torch.equal(merged[HEAD], merged[EMBEDDING]) == (
            lam == {"base": "0", "instruct": "1"}[tied]
        )
    plain = pa_fast.merge(base, base, "0", tmp_path / "plain")
    assert plain.base_fingerprint == report.base_fingerprint, (
        "what is fingerprinted is the files' own tensors"
    )


@pytest.mark.parametrize(
    ("rows", "ties"),
    [((128, 133), (True, False)), ((133, 128), (False, True)), ((133, 128), (False, False))],
)
def test_a_sweep_with_rule_and_noise_equals_the_saved_merges(
    rows: tuple[int, int], ties: tuple[bool, bool], tmp_path: pathlib.Path
) -> None:
    base, instruct = written(tmp_path, rows, ties, ("float32", "bfloat16"))
    rule = [{"match": "lm_head.*", "times": "1/2"}, {"group": "norms", "lambda": 1}]
    job = SweepSpec(
        str(base),
        str(instruct),
        "0,0.3,1",
        (),
        "",
        tokenizer=str(TOKENIZER),
        rounding="stochastic",
        seed=5,
        rule=pa_fast.LambdaRule(rule),
        extra_rows="instruct",
    )
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def look(lm: Any) -> pa_fast.Score:
        seen[str(lm.lam)] = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        return pa_fast.Score(0.0, "none", 1, [])

    look.name, look.higher_is_better = "look", True  # type: ignore[attr-defined]
    out = tmp_path / "run"
    assert not pa_fast.sweep(engine(job), job.lambdas, [look], out=out, figure=False).failures  # type: ignore[list-item]
    for lam in ("0.0", "0.3", "1.0"):
        pa_fast.merge(base, instruct, lam, tmp_path / lam, rounding="stochastic", seed=5, rule=rule)
        assert pa_fast.verify(tmp_path / lam, base, instruct).ok
        assert_same_bits(seen[lam], reload(tmp_path / lam))


def test_a_delta_of_shifted_token_ids_is_refused(tmp_path: pathlib.Path) -> None:
    base, instruct = written(tmp_path, (128, 128))
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0, "a": 1}}}))
    with pytest.raises(PairError, match="`a` is id 1 in base and 0 in instruct"):
        pa_fast.encode(base, instruct, tmp_path / "delta")


def test_rows_are_refused_on_request_and_in_deltas(tmp_path: pathlib.Path) -> None:
    base, instruct = written(tmp_path, (128, 133))
    with pytest.raises(PairError, match="128 vocabulary rows in base and 133 in instruct"):
        pa_fast.load(base, instruct, extra_rows="refuse")
    with pytest.raises(
        PairError, match=r"has shape \[128, 64\] in the base and \[133, 64\] in the instruct model"
    ):
        pa_fast.encode(base, instruct, tmp_path / "delta")


@pytest.mark.parametrize(
    ("rows", "ties"),
    [((128, 128), (False, False)), ((128, 133), (False, False)), ((133, 128), (True, False))],
)
def test_a_vision_language_model_needs_no_table_of_its_own(
    rows: tuple[int, int], ties: tuple[bool, bool], tmp_path: pathlib.Path
) -> None:
    import transformers

    for seed, (side, count, tie) in enumerate(zip(("base", "instruct"), rows, ties)):
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**{**SMALL, "vocab_size": count}),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            ),
            image_token_index=5,
            tie_word_embeddings=tie,
        )
        torch.manual_seed(seed)
        transformers.LlavaForConditionalGeneration(config).bfloat16().save_pretrained(
            tmp_path / side
        )
        (tmp_path / side / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    lm = pa_fast.load(tmp_path / "base", tmp_path / "instruct", tokenizer=TOKENIZER)
    for lam in ("0", "0.3", "1"):
        lm.set_lambda(float(lam))
        pa_fast.merge(tmp_path / "base", tmp_path / "instruct", lam, tmp_path / lam)
        saved = transformers.LlavaForConditionalGeneration.from_pretrained(
            tmp_path / lam, dtype="auto"
        )
        assert saved.config.text_config.vocab_size == max(rows)
        assert_same_bits(lm.model.state_dict(), saved.state_dict())
