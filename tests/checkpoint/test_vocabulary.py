"""Token ids that mean different tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pa_fast.checkpoint.vocabulary import compare_vocabularies
from pa_fast.errors import CheckpointError, PairError


def tokenizer(vocab: Any, **added: int) -> dict[str, Any]:
    entries = [{"id": index, "content": token, "special": True} for token, index in added.items()]
    return {"added_tokens": entries, "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def compare(root: Path, base: Any, instruct: Any) -> tuple[str, ...]:
    for side, document in (("base", base), ("instruct", instruct)):
        (root / side).mkdir()
        if document is not None:
            (root / side / "tokenizer.json").write_text(json.dumps(document))
    return compare_vocabularies(root / "base", root / "instruct")


def test_equal_vocabularies_have_no_notes(tmp_path: Path) -> None:
    assert (
        compare(
            tmp_path,
            tokenizer({"a": 0, "b": 1}, x=2),
            {**tokenizer({"b": 1, "a": 0}, x=2), "version": "1.0"},
        )
        == ()
    )


def test_swapped_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PairError, match=r"2 tokens have different ids: `a` is id 0 in base and 1 in instruct"
    ):
        compare(tmp_path, tokenizer({"a": 0, "b": 1}), tokenizer({"a": 1, "b": 0}))


def test_another_normal_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PairError,
        match=r"1 token ids mean different tokens: id 1 is `b` in base and `c` in instruct",
    ):
        compare(tmp_path, tokenizer({"a": 0, "b": 1}), tokenizer({"a": 0, "c": 1}))


def test_a_renamed_added_token_is_a_note(tmp_path: Path) -> None:
    notes = compare(tmp_path, tokenizer({"a": 0}, reserved_5=1), tokenizer({"a": 0}, eot=1))
    assert notes == ("1 added tokens are renamed in instruct: `reserved_5` -> `eot`",)


def test_a_normal_token_that_becomes_an_added_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="mean different tokens"):
        compare(tmp_path, tokenizer({"a": 0, "b": 1}), tokenizer({"a": 0}, eot=1))


def test_an_added_token_that_moved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="`eot` is id 1 in base and 2 in instruct"):
        compare(
            tmp_path,
            tokenizer({"a": 0}, eot=1, reserved=2),
            tokenizer({"a": 0}, reserved_too=1, eot=2),
        )


def test_tokens_of_one_side_are_a_note(tmp_path: Path) -> None:
    notes = compare(tmp_path, tokenizer({"a": 0}), tokenizer({"a": 0}, im_end=1))
    assert notes == ("1 token ids are in the tokenizer of instruct only: `im_end`",)


def test_unigram_vocabularies(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="`y` is id 1 in base and 0 in instruct"):
        compare(
            tmp_path, tokenizer([["x", 0.0], ["y", -1.0]]), tokenizer([["y", 0.0], ["z", -1.0]])
        )


def test_a_missing_tokenizer_is_a_note(tmp_path: Path) -> None:
    (note,) = compare(tmp_path, tokenizer({"a": 0}), None)
    assert "not compared" in note and str(tmp_path / "instruct") in note


@pytest.mark.parametrize(
    "broken",
    [{}, {"model": {"vocab": {"a": "0"}}}, {"model": {"vocab": [0]}}, {"model": {"vocab": 3}}],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer.json"):
        compare(tmp_path, tokenizer({"a": 0}), broken)
