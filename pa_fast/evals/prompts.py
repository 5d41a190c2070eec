"""Prompts: what a model is asked to go on from, as a text or as the turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pa_fast.base import Tokenizer
from pa_fast.errors import EvaluatorError
from pa_fast.evals.encoding import Encoder
from pa_fast.evals.rows import Row


@dataclass(frozen=True)
class Prompt:
    """A text that is taken as it is, or messages for the tokenizer's chat template; `where` names it in errors."""

    where: str
    content: str | Sequence[Mapping[str, str]]


def chat(where: str, text: str) -> Prompt:
    """One message of a user."""
    return Prompt(where, [{"role": "user", "content": text}])


def read_prompt(row: Row, as_chat: bool) -> Prompt:
    """The prompt of a row: its field `prompt`, or `messages`, a list of `{"role": …, "content": …}`.

    Raises:
        EvaluatorError: neither, both, not of that form, or messages without the chat template.
    """
    if ("prompt" in row.fields) == ("messages" in row.fields):
        raise EvaluatorError(
            f"{row.where}: found the fields {sorted(row.fields)}, expected either `prompt` or `messages`",
            "see the generate example of `pa-fast sweep --help`",
        )
    if "prompt" in row.fields:
        text = row.text("prompt")
        return chat(row.where, text) if as_chat else Prompt(row.where, text)
    messages = row.fields["messages"]
    if not as_chat:
        raise EvaluatorError(
            f"{row.where}: `messages` need the chat template, and chat=false", "pass chat=true, or give a `prompt`"
        )
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise EvaluatorError(
            f"{row.where}: `messages` is {messages!r}, expected a list of messages", 'write [{"role": "user", "content": "…"}]'
        )
    return Prompt(row.where, messages)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and all(isinstance(v, str) for v in value.values())


def encoded(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> tuple[list[str], list[list[int]]]:
    """The text of each prompt as the model sees it, and its tokens. A chat template writes special tokens itself.

    Raises:
        EvaluatorError: no chat template, one that refuses the messages, or a prompt of no tokens.
    """
    texts, ids = [], []
    encode = Encoder(tokenizer)
    for prompt in prompts:
        is_chat = not isinstance(prompt.content, str)
        texts.append(prompt.content if isinstance(prompt.content, str) else _templated(tokenizer, prompt))
        ids.append(encode.rendered(texts[-1]) if is_chat else encode(texts[-1]))
        if not ids[-1]:
            raise EvaluatorError(f"{prompt.where}: the prompt has no tokens", "begin it with a text that the tokenizer knows")
    return texts, ids


def _templated(tokenizer: Any, prompt: Prompt) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise EvaluatorError(
            "chat=true, and the tokenizer has no chat template", "pass --tokenizer with a folder that has one, or chat=false"
        )
    try:
        text = tokenizer.apply_chat_template(prompt.content, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may refuse roles or their order
        raise EvaluatorError(f"{prompt.where}: the chat template refuses it: {error}", "check roles and their order") from error
    return str(text)
