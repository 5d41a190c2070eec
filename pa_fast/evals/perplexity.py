"""Perplexity of documents, over windows with a stride."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, Tokenizer
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.files import DataFile, limited, read_file
from pa_fast.evals.kind import EvalSpec, Kind
from pa_fast.evals.likelihood import Pair, Prepared, logprobs
from pa_fast.evals.rows import read_rows


def windows(ids: list[int], bos: int | None, window: int, stride: int) -> list[Pair]:
    """Cut `ids` into (context, continuation) pairs of at most `window` tokens that score each token once.

    The first window starts at BOS, or without one at the first token, which is then context only. Each later one
    scores the next `stride` tokens with all the context that the window still has room for.
    """
    whole = ids if bos is None else [bos, *ids]
    found = []
    done = 1
    while done < len(whole):
        end = min(len(whole), window if done == 1 else done + stride)
        found.append((whole[max(0, end - window) : done], whole[done:end]))
        done = end
    return found


def check_windows(window: int, stride: int) -> None:
    """Raise UsageError unless 1 ≤ stride < window. No stride scores all of a window: its first token has nothing before it."""
    if window < 2 or stride < 1:
        raise UsageError(f"window {window}, stride {stride}; expected 1 ≤ stride < window", "such as window 512, stride 256")
    if stride >= window:
        raise UsageError(
            f"window {window}, stride {stride}; expected 1 ≤ stride < window",
            f"the first token of a window is context alone: stride {window - 1} has windows that share nothing else",
        )


class Perplexity:
    """exp of the mean nats per token over all documents; an item is a document, its score its nats per token.

    Args:
        data: `.jsonl`: one document a row, in its field `text`; anything else: the whole file is one document.
        window: tokens that the model sees at once, context included.
        stride: tokens that each window after the first scores; 1 ≤ stride < window. At window − 1 windows share one token, which
            is scored in the one and context in the next.
        split: `blank` makes one document of each run of lines between blank ones.

    Raises:
        EvaluatorError: no document, or a document of no scorable token.
    """

    higher_is_better = False

    def __init__(self, name: str, data: DataFile, *, window: int, stride: int, split: str, limit: int | None, seed: int):
        check_windows(window, stride)
        self.name = name
        self.window, self.stride = window, stride
        self.documents = limited(_documents(data, split), limit, seed)
        self.identity: Mapping[str, Any] = {
            "evaluator": "perplexity",
            "window": window,
            "stride": stride,
            "split": split,
            "limit": limit,
            "seed": seed,
            "sha256": data.sha256,
        }
        self._prepared = Prepared(self._windows)

    def __call__(self, engine: Engine) -> Score:
        pairs, owners = self._prepared(engine.tokenizer)
        nats = {document: 0.0 for document, _ in self.documents}
        tokens = dict.fromkeys(nats, 0)
        for owner, pair, logprob in zip(owners, pairs, logprobs(engine, pairs, lambda i: f"document {owners[i]}")):
            nats[owner] -= logprob
            tokens[owner] += len(pair[1])
        mean = sum(nats.values()) / sum(tokens.values())
        if mean > 700:
            raise EvaluatorError(f"{self.name}: {mean:.4g} nats per token, whose exponential is not a number")
        items = [Item(document, "documents", nats[document] / tokens[document]) for document in nats]
        return Score(math.exp(mean), f"perplexity, window {self.window}", len(items), items)

    def _windows(self, tokenizer: Tokenizer) -> tuple[list[Pair], list[str]]:
        pairs: list[Pair] = []
        owners: list[str] = []
        for document, text in self.documents:
            ids = tokenizer.encode(text, add_special_tokens=False)
            bos = None if ids[:1] == [tokenizer.bos_token_id] else tokenizer.bos_token_id
            cut = windows(ids, bos, self.window, self.stride)
            if not cut:
                raise EvaluatorError(f"{self.name}: document {document} is too short: no token to score", "leave it out")
            pairs += cut
            owners += [document] * len(cut)
        return pairs, owners


def _documents(data: DataFile, split: str) -> list[tuple[str, str]]:
    """(id, text) of each document, in file order; ids are row numbers or `0`, `1`, …"""
    if data.path.suffix == ".jsonl":
        if split != "none":
            raise UsageError(f"perplexity: split={split} is for text files; {data.path} has one document a row")
        found = []
        for row in read_rows(data):
            text = row.fields.get("text")
            if not isinstance(text, str) or not text:
                raise EvaluatorError(f"{row.where}: found no text in the field `text`", 'write {"text": "…"} a line')
            found.append((str(row.number), text))
        return found
    texts = re.split(r"\n[ \t]*(?:\n[ \t]*)+", data.text.replace("\r\n", "\n").strip()) if split == "blank" else [data.text]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise EvaluatorError(f"{data.path} is empty", "give it at least one document")
    return [(str(number), text) for number, text in enumerate(texts)]


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    window = spec.count("window", 512, least=2)
    return Perplexity(
        spec.column,
        read_file(spec.path(spec.target)),
        window=window,
        stride=spec.count("stride", max(1, window // 2), least=1),
        split=spec.word("split", ("none", "blank")),
        limit=limit,
        seed=seed,
    )


KIND = Kind("perplexity", "file", "perplexity:FILE.txt,window=512,stride=256", ("window", "stride", "split"), _build)
