"""The demo's language: transformations of short strings, shown by example or asked for by name.

    few-shot    abc>cba\\nhsk>ksh\\n…   transformation shown, never named; base model learns it
    request     [rev abc]cba<eos>      transformation named, one turn; instruct model learns it

A string belongs to evaluation or to training by its own hash (`held_out`), for every transformation
and for both forms, so no evaluation item can have been trained on, whatever the seed and the number
of steps.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from typing import Any

LETTERS = string.ascii_lowercase
VOWELS = "aeiou"
LENGTHS = range(4, 8)
LINES = 7
"""Examples in one few-shot document, in training; evaluation shows five and asks for the sixth."""
OPTIONS = 8
"""Answers that a few-shot item offers; with four, a base model of 1,400 steps was right on 0.96 of
the items."""
ALPHABET = string.ascii_letters + ">[] \n"


def _shift(text: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in text)


TASKS: dict[str, Callable[[str], str]] = {
    "rev": lambda s: s[::-1],
    "left": lambda s: s[1:] + s[0],
    "right": lambda s: s[-1] + s[:-1],
    "next": lambda s: _shift(s, 1),
    "dup": lambda s: "".join(c + c for c in s),
    "upper": lambda s: s.upper(),
    "tail": lambda s: s[1:],
    "last": lambda s: s[-1] * len(s),
    "sort": lambda s: "".join(sorted(s)),
    "prev": lambda s: _shift(s, -1),
    "vowels": lambda s: "".join(c for c in s if c not in VOWELS) or s,
    "ends": lambda s: s[-1] + s[1:-1] + s[0],
    "odds": lambda s: s[::2] + s[1::2],
    "skip": lambda s: _shift(s, 2),
    "revnext": lambda s: _shift(s, 1)[::-1],
    "revupper": lambda s: s[::-1].upper(),
}
RARE = tuple(TASKS)[8:]
"""Transformations that few-shot documents seldom show; requests name all alike."""


def held_out(text: str) -> bool:
    """Whether the string `text` belongs to evaluation: one in eight does, by its CRC-32."""
    return zlib.crc32(text.encode()) % 8 == 0


def draw(rng: random.Random, *, evaluation: bool) -> str:
    """A string of 4 to 7 different letters that belongs to evaluation, or that does not. A third
    have extra vowels."""
    while True:
        letters = LETTERS + VOWELS * 3 if rng.random() < 1 / 3 else LETTERS
        text = "".join(rng.choices(letters, k=rng.choice(LENGTHS)))
        if len(set(text)) == len(text) and held_out(text) == evaluation:
            return text


def few_shot(task: str, texts: list[str]) -> str:
    """One example a line, the transformation never named."""
    return "".join(f"{text}>{TASKS[task](text)}\n" for text in texts)


def request(task: str, text: str) -> str:
    """A request that names the transformation, up to where the answer begins."""
    return f"[{task} {text}]"


def few_shot_items(seed: int, per_task: int, pool: int) -> list[dict[str, Any]]:
    """Rows for `icl`: per transformation, `pool` examples to show and `per_task` items of `OPTIONS`
    options each.

    Of the wrong options one is what another transformation makes of the same string, the rest are
    the right answer with a slip of the kind that small models make. None begins with another, since
    the shorter one would win or lose by its length alone.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        seen: set[str] = set()
        for index in range(pool):
            text = _fresh(rng, seen)
            rows.append(
                {
                    "id": f"{task}-pool-{index}",
                    "group": task,
                    "split": "pool",
                    "prompt": f"{text}>",
                    "answer": TASKS[task](text),
                }
            )
        while len(seen) < pool + per_task:
            text = _fresh(rng, seen)
            choices = _options(rng, task, text)
            if choices is None:
                seen.discard(text)
                continue
            row = {
                "id": f"{task}-{len(seen) - pool - 1}",
                "group": task,
                "prompt": f"{text}>",
                "choices": choices,
                "answer": TASKS[task](text),
            }
            rows.append(row)
    return rows


def request_items(seed: int, per_task: int) -> list[dict[str, str]]:
    """Rows for `follow`: a named request and its one right answer."""
    rng = random.Random(seed)
    rows = []
    for task in TASKS:
        seen: set[str] = set()
        for index in range(per_task):
            text = _fresh(rng, seen)
            rows.append(
                {
                    "id": f"{task}-{index}",
                    "group": task,
                    "prompt": request(task, text),
                    "answer": TASKS[task](text),
                }
            )
    return rows


def _fresh(rng: random.Random, seen: set[str]) -> str:
    while (text := draw(rng, evaluation=True)) in seen:
        pass
    seen.add(text)
    return text


def _options(rng: random.Random, task: str, text: str) -> list[str] | None:
    right = TASKS[task](text)
    if len(right) < 2:
        return None
    options = [right]
    other = TASKS[rng.choice(sorted(TASKS))](text)
    for option in [other, *(_slip(rng, right, text) for _ in range(50))]:
        if not any(option.startswith(taken) or taken.startswith(option) for taken in options):
            options.append(option)
        if len(options) == OPTIONS:
            rng.shuffle(options)
            return options
    return None


def _slip(rng: random.Random, right: str, text: str) -> str:
    """`right` with two neighbours swapped, or with one letter taken for its neighbour in the
    alphabet or in `text`."""
    at = rng.randrange(len(right))
    if rng.random() < 0.5 and at > 0:
        return right[: at - 1] + right[at] + right[at - 1] + right[at + 1 :]
    letter = right[at].lower()
    wrong = rng.choice([_shift(letter, -1), _shift(letter, 1), *text])
    return right[:at] + (wrong.upper() if right[at].isupper() else wrong) + right[at + 1 :]
