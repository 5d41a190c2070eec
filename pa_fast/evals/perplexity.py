"""Perplexity of documents, over windows with a stride."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, Tokenizer
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.kind import EvalSpec, EvaluatorKind
from pa_fast.evals.prompts import POLICIES, Overflow, each
from pa_fast.evals.rows import DataFile, DataRow, limited, read_file, read_rows
from pa_fast.evals.scores import AVERAGES, Prepared, TokenPair, labelled, logprobs

WINDOW = 512
"""Tokens of a window by default, where the model has as many positions."""

GROUP = "documents"


def windows(ids: list[int], bos: int | None, window: int, stride: int) -> list[TokenPair]:
    """Cut `ids` into (context, continuation) pairs of at most `window` tokens that score each token
    once.

    The first window starts at BOS, or without one at the first token, which is then context only.
    Each later one scores the next `stride` tokens, with as much context as the window holds.
    """
    whole = ids if bos is None else [bos, *ids]
    pairs = []
    done = 1
    while done < len(whole):
        end = min(len(whole), window if done == 1 else done + stride)
        pairs.append((whole[max(0, end - window) : done], whole[done:end]))
        done = end
    return pairs


def check_windows(window: int, stride: int) -> None:
    """Raise UsageError unless 1 ≤ stride < window. No stride scores all of a window: its first
    token has nothing before it."""
    if window < 2 or stride < 1:
        raise UsageError(
            f"window {window}, stride {stride}; expected 1 ≤ stride < window",
            "such as window 512, stride 256",
        )
    if stride >= window:
        raise UsageError(
            f"window {window}, stride {stride}; expected 1 ≤ stride < window",
            f"the first token of a window is context alone: stride {window - 1} has windows that"
            " share nothing else",
        )


@dataclass(frozen=True)
class _Document:
    """One document; `where` names it in errors."""

    id: str
    group: str
    text: str
    where: str


@dataclass(frozen=True)
class _Windows:
    """The windows of all documents that are scored; `owners` has the document of each pair."""

    window: int
    pairs: list[TokenPair]
    owners: list[_Document]
    figures: dict[str, float]
    notes: list[str]


class Perplexity:
    """exp of the mean nats per token over all documents; an item is a document, its score its nats
    per token.

    Where documents have groups, the mean is that over groups of each one's nats per token, or with
    `average=micro` over all tokens.

    Args:
        data: `.jsonl`: one document a row, in its field `text`, optionally with `group`; anything
            else: the whole file is one document.
        window: tokens that the model sees at once, context included; None: 512, or as many as the
            model has positions for.
        stride: tokens that each window after the first scores; 1 ≤ stride < window. At window − 1
            windows share one token, which is scored in the one and context in the next; None: half
            the window.
        split: `blank` makes one document of each run of lines between blank ones.
        overflow: policy for a document whose windows are too long for the model: `skip` leaves it
            out, `truncate` makes all windows as long as the model has positions.
        average: see `scores.AVERAGES`.

    Raises:
        EvaluatorError: no document.
    """

    higher_is_better = False

    def __init__(
        self,
        name: str,
        data: DataFile,
        *,
        window: int | None,
        stride: int | None,
        split: str,
        limit: int | None,
        seed: int,
        overflow: str = "refuse",
        average: str = "macro",
    ):
        check_windows(window or WINDOW, _stride(window or WINDOW, stride))
        self.name = name
        self.window, self.stride = window, stride
        self.overflow, self.average = overflow, average
        documents = _documents(data, split)
        self.documents = limited(documents, [document.group for document in documents], limit, seed)
        self.identity: Mapping[str, Any] = {
            "evaluator": "perplexity",
            "window": window or f"{WINDOW} at most",
            "stride": stride,
            "split": split,
            "overflow": overflow,
            "average": average,
            "limit": limit,
            "seed": seed,
            "sha256": data.sha256,
        }
        self._prepared = Prepared(self._windows)

    def check(self, engine: Engine) -> list[str]:
        """Raise if a document has no token to score, or windows do not fit the model; return notes
        on what is changed."""
        return self._prepared(engine).notes

    def item_count(self, engine: Engine) -> int:
        """Return the number of items that are scored."""
        return len({owner.id for owner in self._prepared(engine).owners})

    def __call__(self, engine: Engine) -> Score:
        prepared = self._prepared(engine)
        nats = {document.id: 0.0 for document in prepared.owners}
        tokens = dict.fromkeys(nats, 0)
        scored = {document.id: document for document in prepared.owners}
        values = logprobs(engine, prepared.pairs, lambda i: f"document {prepared.owners[i].id}")
        for owner, pair, logprob in zip(prepared.owners, prepared.pairs, values):
            nats[owner.id] -= logprob
            tokens[owner.id] += len(pair[1])
        mean = self._mean(list(scored.values()), nats, tokens)
        if mean > 700:
            raise EvaluatorError(
                f"{self.name}: {mean:.4g} nats per token, whose exponential is not a number"
            )
        items = self._items(scored.values(), nats, tokens)
        unit = labelled(
            f"perplexity, window {prepared.window}",
            [document.group for document in self.documents],
            self.average,
        )
        return Score(math.exp(mean), unit, len(items), items, prepared.figures)

    def _items(
        self,
        documents: Collection[_Document],
        nats: Mapping[str, float],
        tokens: Mapping[str, int],
    ) -> list[Item]:
        """Return an item for each document, weighted by its tokens; where groups count the same, by
        its share of the tokens of its group."""
        sizes: Counter[str] = Counter()
        for one in documents:
            sizes["" if self.average == "micro" else one.group] += tokens[one.id]
        mean = sum(sizes.values()) / len(sizes)
        return [
            Item(
                one.id,
                one.group,
                nats[one.id] / tokens[one.id],
                tokens[one.id] * mean / sizes["" if self.average == "micro" else one.group],
                {"nats": nats[one.id], "tokens": float(tokens[one.id])},
            )
            for one in documents
        ]

    def _mean(
        self, documents: Sequence[_Document], nats: Mapping[str, float], tokens: Mapping[str, int]
    ) -> float:
        """Return nats per token: over the tokens of all documents, or over groups that count the
        same."""
        groups: dict[str, list[str]] = {}
        for document in documents:
            groups.setdefault("" if self.average == "micro" else document.group, []).append(
                document.id
            )
        means = [
            sum(nats[id] for id in ids) / sum(tokens[id] for id in ids) for ids in groups.values()
        ]
        return sum(means) / len(means)

    def _windows(self, tokenizer: Tokenizer, positions: int | None) -> _Windows:
        window = self.window or min(WINDOW, positions or WINDOW)
        if self.overflow == "truncate" and positions is not None:
            window = min(window, positions)
        stride = _stride(window, self.stride)
        try:
            check_windows(window, stride)
        except UsageError as error:  # its own window and stride were checked: they are shorter here
            message = f"{error.message}: the model has positions for {positions} tokens"
            raise UsageError(message, error.hint) from None

        def make(index: int, _: int) -> list[TokenPair]:
            document = self.documents[index]
            ids = tokenizer.encode(document.text, add_special_tokens=False)
            bos = None if ids[:1] == [tokenizer.bos_token_id] else tokenizer.bos_token_id
            cut = windows(ids, bos, window, stride)
            if not cut:
                raise EvaluatorError(
                    f"{document.where} is too short: no token to score", "leave it out"
                )
            return cut

        fitted = Overflow(
            "skip" if self.overflow == "skip" else "refuse",
            ("refuse", "skip"),  # windows are truncated before
            [document.where for document in self.documents],
            [0] * len(self.documents),
            make,
            lambda pairs: max(
                len(context) + len(continuation) - 1 for context, continuation in pairs
            ),
            lambda pairs, count: None,
            lambda longest: [] if positions is None else _shorter_windows(positions, self.stride),
        ).fit(positions)
        owners = [
            self.documents[index] for index, cut in zip(fitted.kept, fitted.requests) for _ in cut
        ]
        notes = list(fitted.notes)
        if window != (self.window or WINDOW):
            notes.append(
                f"windows have {window} tokens, not {self.window or WINDOW}: the model has no more"
                " positions"
            )
        return _Windows(
            window, [pair for cut in fitted.requests for pair in cut], owners, fitted.figures, notes
        )


def _shorter_windows(positions: int, stride: int | None) -> list[str]:
    """Return hints for windows that are longer than the model has `positions`."""
    if positions < 2:
        return []
    if stride is not None and stride >= positions:
        return [f"take window={positions},stride={_stride(positions, None)}"]
    return [
        f"overflow=truncate takes windows of {positions} tokens instead",
        f"take window={positions}, which says so in the name of the column",
    ]


def _stride(window: int, stride: int | None) -> int:
    return max(1, window // 2) if stride is None else stride


def _documents(data: DataFile, split: str) -> list[_Document]:
    """Return the documents in file order; ids are row numbers or `0`, `1`, …"""
    if data.path.suffix == ".jsonl":
        if split != "none":
            raise UsageError(
                f"perplexity: split={split} is for text files; {data.path} has one document a row",
                "leave it out",
            )
        return each(read_rows(data), _document, "rows")
    texts = (
        re.split(r"\n[ \t]*(?:\n[ \t]*)+", data.text.replace("\r\n", "\n").strip())
        if split == "blank"
        else [data.text]
    )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise EvaluatorError(f"{data.path} is empty", "give it at least one document")
    return [
        _Document(str(number), GROUP, text, f"{data.path}: document {number}")
        for number, text in enumerate(texts)
    ]


def _document(row: DataRow) -> _Document:
    text = row.fields.get("text")
    if not isinstance(text, str) or not text:
        raise EvaluatorError(
            f"{row.where}: found no text in the field `text`", 'write {"text": "…"} a line'
        )
    return _Document(
        str(row.number), row.label("group", GROUP), text, f"{row.where}: document {row.number}"
    )


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    overflow = spec.word("overflow", POLICIES)
    named = spec
    if overflow == "truncate" and "window" in spec.options:
        # the unit says which window it is; the column must not say another
        most = f"{spec.options['window']} at most"
        named = replace(spec, options={**spec.options, "window": most})
    return Perplexity(
        named.column,
        read_file(spec.path(spec.target)),
        window=spec.count("window", WINDOW, least=2) if "window" in spec.options else None,
        stride=spec.count("stride", WINDOW // 2, least=1) if "stride" in spec.options else None,
        split=spec.word("split", ("none", "blank")),
        limit=limit,
        seed=seed,
        overflow=overflow,
        average=spec.word("average", AVERAGES),
    )


KIND = EvaluatorKind(
    "perplexity",
    "file",
    "perplexity:FILE.txt,window=512,stride=256",
    ("window", "stride", "split", "overflow", "average"),
    _build,
)
