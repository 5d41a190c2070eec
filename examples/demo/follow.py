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
    texts = [engine.tokenizer.decode(answer) for answer in answers]
    items = [
        Item(row["id"], row["group"], float(text == row["answer"]))
        for row, text in zip(ROWS, texts)
    ]
    kept = "".join(
        json.dumps({**row, "output": text, "score": item.score}) + "\n"
        for row, text, item in zip(ROWS, texts, items)
    )
    accuracy = sum(item.score for item in items) / len(items)
    return Score(accuracy, "exact match", len(items), items, files={"outputs.jsonl": kept})


follow.identity = {"requests_sha256": hashlib.sha256(DATA.read_bytes()).hexdigest()}  # type: ignore[attr-defined]
