"""Rows of chat tokens that one side never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.vocabulary import chat_tokens, untrained_rows
from tests.checkpoint.pairs import CONFIG, random_tensors, write_checkpoint

EMBEDDING = "model.embed_tokens.weight"
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1}},
    "added_tokens": [
        {"id": 38, "content": "<|eot_id|>"},
        {"id": 39, "content": "<|reserved|>"},
        {"id": 2, "content": "</s>"},
    ],
}


def written(root: Path, side: str, zero: tuple[int, ...] = (), **config: Any) -> Checkpoint:
    tensors = random_tensors(torch.bfloat16)
    tensors[EMBEDDING][list(zero)] = 1e-20
    folder = write_checkpoint(
        root / side, tensors, config={**CONFIG, **config}, tokenizer=TOKENIZER
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ m }}<|eot_id|>"})
    )
    return Checkpoint.open(folder)


def test_rows_near_zero_on_one_side_are_told(tmp_path: Path) -> None:
    base, instruct = written(tmp_path, "base", (38, 39)), written(tmp_path, "instruct", (39,))
    (note,) = untrained_rows(base, instruct)
    assert (
        note.startswith(
            f"`{EMBEDDING}` of base was never trained for `<|eot_id|>`, which chats use"
        )
        and "λ" in note
    )
    assert note in merge(base.folder, instruct.folder, 0.3, tmp_path / "out").notes
    assert untrained_rows(instruct, instruct) == (), "the reserved token is in no chat"


@pytest.mark.parametrize("where", ["config", "generation_config.json"])
def test_stop_tokens_count_as_chat_tokens(tmp_path: Path, where: str) -> None:
    instruct = written(
        tmp_path, "instruct", **({"eos_token_id": [2, 38]} if where == "config" else {})
    )
    if where != "config":
        (instruct.folder / where).write_text('{"eos_token_id": 2}')
    assert chat_tokens(instruct.folder, instruct.config) == {2: "</s>", 38: "<|eot_id|>"}


@pytest.mark.parametrize("template", [[{"name": "default", "template": "</s>"}], "</s>", 3, None])
def test_templates_in_every_form(tmp_path: Path, template: Any) -> None:
    folder = written(tmp_path, "instruct").folder
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert chat_tokens(folder, {}) == ({2: "</s>"} if template not in (3, None) else {})
    (folder / "chat_template.jinja").write_text("<|eot_id|>")
    assert 38 in chat_tokens(folder, {})
    (folder / "tokenizer.json").unlink()
    assert chat_tokens(folder, {}) == {}


def test_an_embedding_of_zeros_has_no_typical_row(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, "base", tuple(range(40)))
    assert untrained_rows(checkpoint, checkpoint) == ()
