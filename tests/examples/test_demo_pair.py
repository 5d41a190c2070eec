"""The demo pair that ships is what `examples/demo` says it is."""

from __future__ import annotations

import json
import pathlib
import struct
import sys
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import data, train
from pa_fast.evals import build

DEMO = pathlib.Path(train.__file__).parent
SIDES = {"base": 2, "instruct": 3}


def header(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(size))
    found.pop("__metadata__", None)
    return found


def shards(side: str) -> list[set[str]]:
    return [set(header(path)) for path in sorted((DEMO / "pair" / side).glob("*.safetensors"))]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def scored() -> list[dict[str, Any]]:
    return [row for row in rows("fewshot.jsonl") if row.get("split") != "pool"]


def test_two_sides_sharded_and_cut_differently() -> None:
    assert {side: len(shards(side)) for side in SIDES} == SIDES
    assert set().union(*shards("base")) == set().union(*shards("instruct"))
    assert not any(shard in shards("base") for shard in shards("instruct"))


@pytest.mark.parametrize("side", SIDES)
def test_small_bf16_and_complete(side: str) -> None:
    folder = DEMO / "pair" / side
    tensors = [entry for path in folder.glob("*.safetensors") for entry in header(path).values()]
    assert {entry["dtype"] for entry in tensors} == {"BF16"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert (folder / "chat_template.jinja").exists() == (side == "instruct")


def test_one_tokenizer() -> None:
    texts = [
        (DEMO / "pair" / side / "tokenizer.json").read_text(encoding="utf-8") for side in SIDES
    ]
    assert texts[0] == texts[1]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "pair" / "instruct")
    text = "abc>CBA\n[rev abc]"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert len(ids) == len(text) + 1


def test_no_evaluation_item_could_be_trained_on() -> None:
    strings = [row["prompt"].rstrip(">") for row in rows("fewshot.jsonl")]
    strings += [row["prompt"].strip("[]").split()[1] for row in rows("requests.jsonl")]
    assert all(data.held_out(text) for text in strings)
    rng = train.random.Random(5)
    assert not any(data.held_out(data.draw(rng, evaluation=False)) for _ in range(2000))


def test_items_are_right_and_say_what_training_said() -> None:
    for row in rows("fewshot.jsonl"):
        text = row["prompt"].rstrip(">")
        assert row["prompt"] + row["answer"] + "\n" == data.few_shot(row["group"], [text])
    for row in rows("requests.jsonl"):
        task, text = row["prompt"].strip("[]").split()
        assert (task, data.TASKS[task](text)) == (row["group"], row["answer"])


def test_options_hold_the_right_answer_once_and_no_beginning_of_another() -> None:
    for row in scored():
        assert len(row["choices"]) == data.OPTIONS
        assert row["choices"].count(row["answer"]) == 1
        assert not any(a != b and b.startswith(a) for a in row["choices"] for b in row["choices"])
    places = [row["choices"].index(row["answer"]) for row in scored()]
    assert max(places.count(place) for place in range(data.OPTIONS)) < len(places) / 2, (
        "always answering one place is no skill"
    )


def test_a_prompt_reads_like_a_training_document() -> None:
    evaluator = build(f"icl:{DEMO / 'fewshot.jsonl'},shots=5,sep=\\n")
    for item, shown in zip(evaluator.items, evaluator.shown):  # type: ignore[attr-defined]
        prompt = shown.text(0)
        texts = [line.partition(">")[0] for line in (prompt + item.answer).split("\n")]
        assert len(set(texts)) == 6
        assert prompt + item.answer + "\n" == data.few_shot(item.group, texts)


def test_the_chat_template_writes_the_requests() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "pair" / "instruct")
    row = rows("requests.jsonl")[0]
    message = {"role": "user", "content": row["prompt"].strip("[]")}
    assert tokenizer.apply_chat_template([message], tokenize=False) == "<bos>" + row["prompt"]
    ids = tokenizer.apply_chat_template([message], tokenize=True, return_dict=False)
    assert list(ids) == tokenizer.encode(row["prompt"])


def test_instruct_follows_requests_and_base_does_not() -> None:
    import torch

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "pair" / "instruct")
    right = {}
    for side in SIDES:
        model = AutoModelForCausalLM.from_pretrained(DEMO / "pair" / side)
        assert model.dtype == torch.bfloat16
        count = 0
        for row in rows("requests.jsonl")[::9]:
            prompt = tokenizer.encode(row["prompt"])
            answer = tokenizer.encode(row["answer"], add_special_tokens=False) + [
                tokenizer.eos_token_id
            ]
            with torch.inference_mode():
                likeliest = model(torch.tensor([prompt + answer])).logits[0].argmax(-1).tolist()
            count += likeliest[len(prompt) - 1 : -1] == answer
        right[side] = count / len(rows("requests.jsonl")[::9])
    assert right["base"] < 0.1 and right["instruct"] > 0.8, right


def test_training_starts_over_from_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"BASE_STEPS": 2, "INSTRUCT_STEPS": 2, "DOCUMENTS": 4, "REQUESTS": 16}
    for name, number in few.items():
        monkeypatch.setattr(train, name, number)
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path)])
    train.main()
    for name in (
        "fewshot.jsonl",
        "requests.jsonl",
        "pair/base/tokenizer.json",
        "pair/instruct/chat_template.jinja",
    ):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), (
            f"{name} is not what the script writes"
        )
    for side in SIDES:
        shipped = {path.name: header(path) for path in (DEMO / "pair" / side).glob("*.safetensors")}
        assert {
            path.name: header(path) for path in (tmp_path / "pair" / side).glob("*.safetensors")
        } == shipped
