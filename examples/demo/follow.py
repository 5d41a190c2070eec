"""Instruction following: does the model do what a named request asks? Exact match of greedy
decoding."""

from __future__ import annotations

import hashlib
import json
import pathlib

from pa_fast.base import Engine, Generation, Item, Score

DATA = pathlib.Path(__file__).with_name("requests.jsonl")
ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
LONGEST = max(len(row["answer"]) for row in ROWS)


def follow(engine: Engine) -> Score:
    """Share of requests answered exactly, up to `<eos>`; an item's group is its transformation."""
    stop = engine.tokenizer.eos_token_id
    assert stop is not None, "the demo's tokenizer has <eos>"
    prompts = [engine.tokenizer.encode(row["prompt"]) for row in ROWS]
    answers = engine.generate(prompts, Generation(max_new_tokens=LONGEST + 1, stop=(stop,)))
    items = [
        Item(row["id"], row["group"], float(engine.tokenizer.decode(answer) == row["answer"]))
        for row, answer in zip(ROWS, answers)
    ]
    return Score(sum(item.score for item in items) / len(items), "exact match", len(items), items)


follow.identity = {"requests_sha256": hashlib.sha256(DATA.read_bytes()).hexdigest()}  # type: ignore[attr-defined]
