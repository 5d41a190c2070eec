"""Train the demo pair from scratch and write everything that ships beside this file.

    python -m examples.demo.train

Stage one makes `pair/base` from few-shot documents alone; the rare transformations are a small
share of them. Stage two starts from the saved base and makes `pair/instruct` from named requests,
with some few-shot documents mixed in. Both train in fp32 on two threads and are saved in bf16,
sharded, each side cut differently.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
import shutil
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.data import (
    ALPHABET,
    LINES,
    RARE,
    TASKS,
    draw,
    few_shot,
    few_shot_items,
    held_out,
    request,
    request_items,
)

HERE = pathlib.Path(__file__).parent
BASE_STEPS, INSTRUCT_STEPS = 1200, 400
DOCUMENTS = 32
"""Few-shot documents per step of stage one."""
REQUESTS, KEPT_DOCUMENTS = 160, 4
"""Named requests, and few-shot documents, per step of stage two."""
KEPT_WEIGHT = 0.05
"""What the loss of those documents weighs against the requests'. At 0.1 instruct lost 2.4 points of
its few-shot accuracy, which 704 items cannot tell; with 2 documents at 0.05 and a rate of 2e-3,
accuracy fell from 0.83 to 0.71 along λ, without a rise."""
RARE_SHARE = 0.2
"""How often stage one shows a rare transformation, against 1 for the others."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[{{ message.content"
    " }}]{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
Rows = list[tuple[list[int], list[float]]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, `<bos>` before every text."""
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *ALPHABET])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def documents(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, count: int, rare: float
) -> Rows:
    """Few-shot documents; the strings to transform are noise, so their tokens weigh little."""
    rows = []
    weights = [rare if task in RARE else 1.0 for task in TASKS]
    for task in rng.choices(list(TASKS), weights, k=count):
        text = few_shot(task, [draw(rng, evaluation=False) for _ in range(LINES)])
        answering, cost = False, [0.0]
        for character in text:
            cost.append(1.0 if answering else 0.1)
            answering = character == ">" or (answering and character != "\n")
        rows.append((tokenizer.encode(text), cost))
    return rows


def requests(rng: random.Random, tokenizer: PreTrainedTokenizerFast, count: int) -> Rows:
    """Named requests, ended by `<eos>`; only the answer counts."""
    rows = []
    for task in rng.choices(list(TASKS), k=count):
        text = draw(rng, evaluation=False)
        prompt, answer = (
            tokenizer.encode(request(task, text)),
            tokenizer.encode(TASKS[task](text), add_special_tokens=False),
        )
        rows.append(
            (
                prompt + answer + [tokenizer.eos_token_id],
                [0.0] * len(prompt) + [1.0] * (len(answer) + 1),
            )
        )
    return rows


def loss_of(model: LlamaForCausalLM, rows: Rows) -> torch.Tensor:
    """Weighted mean of the nats per token over right-padded rows."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row, _ in rows])
    weight = torch.tensor([cost + [0.0] * (width - len(cost)) for _, cost in rows])[:, 1:]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view_as(weight)
    return (nats * weight).sum() / weight.sum()


def fit(model: LlamaForCausalLM, batches: list, steps: int, peak: float, floor: float) -> None:
    """AdamW, linear warm-up, cosine from `peak` down to `floor`; the loss is the weighted sum over
    `batches`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    start, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        cosine = floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = cosine * min(1.0, (step + 1) / 100)
        losses = [loss_of(model, make()) for make, _ in batches]
        sum(loss * share for loss, (_, share) in zip(losses, batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            spent = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
            print(
                f"  step {step + 1}/{steps}: loss"
                f" {', '.join(f'{loss.item():.4f}' for loss in losses)} ({spent})",
                flush=True,
            )


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path, shard: str
) -> None:
    """Write a Hugging Face checkpoint, bf16, in shards of at most `shard`."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=HERE,
        help="folder to write pair/ and the evaluation files in",
    )
    parser.add_argument("--seed", type=int, default=0)
    out, seed = (args := parser.parse_args()).out, args.seed
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    shown, asked = few_shot_items(seed, per_task=44, pool=20), request_items(seed + 1, per_task=38)
    assert all(held_out(row["prompt"].rstrip(">")) for row in shown)
    assert all(held_out(row["prompt"].strip("[]").split()[1]) for row in asked)
    write_rows(out / "fewshot.jsonl", shown)
    write_rows(out / "requests.jsonl", asked)

    print(f"stage 1: few-shot documents, {BASE_STEPS} steps", flush=True)
    model = LlamaForCausalLM(make_config(tokenizer))
    print(f"  {sum(p.numel() for p in model.parameters()):,} parameters")
    fit(
        model,
        [(lambda: documents(rng, tokenizer, DOCUMENTS, RARE_SHARE), 1.0)],
        BASE_STEPS,
        3e-3,
        3e-4,
    )
    save(model, tokenizer, out / "pair" / "base", "1300KB")

    print(
        f"stage 2: named requests and some few-shot documents, {INSTRUCT_STEPS} steps", flush=True
    )
    model = LlamaForCausalLM.from_pretrained(
        out / "pair" / "base", dtype=torch.float32, trust_remote_code=False
    )
    rng = random.Random(seed + 2)
    batches = [
        (lambda: requests(rng, tokenizer, REQUESTS), 1.0),
        (lambda: documents(rng, tokenizer, KEPT_DOCUMENTS, 1.0), KEPT_WEIGHT),
    ]
    fit(model, batches, INSTRUCT_STEPS, 1.5e-3, 1e-4)
    tokenizer.chat_template = CHAT_TEMPLATE
    save(model, tokenizer, out / "pair" / "instruct", "900KB")


if __name__ == "__main__":
    main()
