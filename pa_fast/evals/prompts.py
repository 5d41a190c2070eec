"""Prompts: what a model is asked to go on from, as a text or as the turns of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pa_fast.base import Tokenizer
from pa_fast.errors import EvaluatorError
from pa_fast.evals.encoding import Encoder
from pa_fast.evals.overflow import POLICIES, Overflow, cut_left
from pa_fast.evals.rows import Row


@dataclass(frozen=True)
class Prompt:
    """A text that is taken as it is, or messages for the tokenizer's chat template; `where` names
    it in errors."""

    where: str
    content: str | Sequence[Mapping[str, str]]


def chat(where: str, text: str) -> Prompt:
    """One message of a user."""
    return Prompt(where, [{"role": "user", "content": text}])


def read_prompt(row: Row, as_chat: bool) -> Prompt:
    """The prompt of a row: its field `prompt`, or `messages`, a list of `{"role": …, "content":
    …}`.

    Raises:
        EvaluatorError: neither, both, not of that form, or messages without the chat template.
    """
    if ("prompt" in row.fields) == ("messages" in row.fields):
        raise EvaluatorError(
            f"{row.where}: found the fields {sorted(row.fields)}, expected either `prompt` or"
            " `messages`",
            "see the generate example of `pa-fast sweep --help`",
        )
    if "prompt" in row.fields:
        text = row.text("prompt")
        return chat(row.where, text) if as_chat else Prompt(row.where, text)
    messages = row.fields["messages"]
    if not as_chat:
        raise EvaluatorError(
            f"{row.where}: `messages` need the chat template, and chat=false",
            "pass chat=true, or give a `prompt`",
        )
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise EvaluatorError(
            f"{row.where}: `messages` is {messages!r}, expected a list of messages",
            'write [{"role": "user", "content": "…"}]',
        )
    return Prompt(row.where, messages)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in value.values())
    )


@dataclass(frozen=True)
class NewTokens:
    """How much the model may write behind each prompt.

    Attributes:
        most: so many tokens.
        capped: no more than the longest prompt leaves of the model's positions; else prompts
            without room for all of them do not fit.
    """

    most: int
    capped: bool

    @property
    def identity(self) -> int | str:
        """As a run records it."""
        return f"{self.most} at most" if self.capped else self.most

    def least(self, room: int | None, overflow: str) -> int:
        """How many must fit behind each prompt: where prompts may be changed or left out, a quarter
        of the positions, as one that leaves a single token would cap the answers to all."""
        if not self.capped:
            return self.most
        return 1 if room is None or overflow == "refuse" else min(self.most, max(1, room // 4))


@dataclass(frozen=True)
class Fitted:
    """Prompts that fit: which of the given ones, the text of each as the model sees it, and its
    tokens; and how many new tokens there is room for behind all. `figures` and `notes` are those of
    `overflow.Fitted`, with what is said of a cap."""

    kept: list[int]
    texts: list[str]
    ids: list[list[int]]
    new_tokens: int
    figures: dict[str, float]
    notes: list[str]


def written(tokenizer: Tokenizer, prompt: Prompt) -> tuple[str, list[int]]:
    """`prompt` for the model. A chat template writes special tokens itself; in other texts BOS is
    as the tokenizer says, once.

    Raises:
        EvaluatorError: no chat template, one that refuses the messages, or a prompt of no tokens.
    """
    encode = Encoder(tokenizer)
    if isinstance(prompt.content, str):
        text = prompt.content
        ids = encode(text)
    else:
        text = _templated(tokenizer, prompt)
        ids = encode.rendered(text)
    if not ids:
        raise EvaluatorError(
            f"{prompt.where}: the prompt has no tokens",
            "begin it with a text that the tokenizer knows",
        )
    return text, ids


def fitted(
    tokenizer: Tokenizer,
    room: int | None,
    prompts: Sequence[Prompt],
    new_tokens: NewTokens,
    overflow: str,
    policies: Sequence[str] = POLICIES,
    shorter: Callable[[int, int], Prompt] | None = None,
    shots: Sequence[int] | None = None,
) -> Fitted:
    """`prompts` with room for new tokens behind each.

    Args:
        overflow: what becomes of those that have none, one of `policies`.
        shorter: (prompt, shots left out) → prompt, where prompts have `shots`.

    Raises:
        EvaluatorError: see `written`, `Overflow.fit`.
    """
    prefix = Encoder(tokenizer).prefix
    least = new_tokens.least(room, overflow)

    def make(index: int, dropped: int) -> tuple[str, list[int]]:
        return written(
            tokenizer,
            shorter(index, dropped) if shorter is not None and dropped else prompts[index],
        )

    def cut(request: tuple[str, list[int]], count: int) -> tuple[str, list[int]] | None:
        ids = cut_left(request[1], count, prefix)
        return None if ids is None else (request[0], ids)

    def advice(longest: int) -> list[str]:
        if room is None or new_tokens.capped:
            return []
        shortest = max(1, len(prefix)) if overflow == "truncate" else longest - least
        if shortest < room:
            return [f"max_new_tokens={room - shortest} or less leaves room behind every prompt"]
        # no prompt leaves so much room, however it is cut
        both = f"max_new_tokens={room // 2},overflow=truncate cuts prompts on the left"
        return [both] if new_tokens.most >= room else []

    found = Overflow(
        overflow,
        policies,
        [prompt.where for prompt in prompts],
        [0] * len(prompts) if shots is None else shots,
        make,
        lambda request: len(request[1]) + least,
        cut,
        advice,
        least,
    ).fit(room)
    texts, ids = zip(*found.requests)
    longest = max(range(len(ids)), key=lambda place: len(ids[place]))
    count = new_tokens.most
    if new_tokens.capped and room is not None:
        count = min(count, room - len(ids[longest]))
    figures, notes = found.figures, found.notes
    if count < new_tokens.most:
        figures = {**figures, "max_new_tokens": float(count)}
        notes = [
            *notes,
            (
                f"answers have at most {count} tokens, not {new_tokens.most}: no more fit the model"
                f" behind the longest prompt, {prompts[found.kept[longest]].where}, of"
                f" {len(ids[longest])} tokens"
            ),
        ]
    return Fitted(found.kept, list(texts), list(ids), count, figures, notes)


def _templated(tokenizer: Any, prompt: Prompt) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise EvaluatorError(
            f"{prompt.where}: chat=true, and the tokenizer has no chat template",
            "pass --tokenizer with a folder that has one, or chat=false",
        )
    try:
        text = tokenizer.apply_chat_template(
            prompt.content, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, and may refuse roles or their order
        raise EvaluatorError(
            f"{prompt.where}: the chat template refuses it: {error}", "check roles and their order"
        ) from error
    return str(text)
