"""A toy model over characters, whose likelihoods anyone can work out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from pa_fast.base import Continuation, Generation

Rule = Callable[[list[int], int], float]


class Characters:
    """One token a character (its code point); BOS, if there is one, is token 1. Merges make pairs
    one token."""

    eos_token_id: int | None = 2

    def __init__(self, bos: bool = True, merges: Sequence[str] = ()):
        self.bos_token_id = 1 if bos else None
        self.merges = {merge: 0x110000 + index for index, merge in enumerate(merges)}
        self.calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        ids = [1] if add_special_tokens and self.bos_token_id else []
        while text:
            size = 2 if text[:2] in self.merges else 1
            ids.append(self.merges[text[:2]] if size == 2 else ord(text[0]))
            text = text[size:]
        return ids

    def decode(self, token_ids: list[int]) -> str:
        names = {number: merge for merge, number in self.merges.items()}
        return "".join(names.get(token) or chr(token) for token in token_ids)


def by_position(context: list[int], token: int) -> float:
    """A log-likelihood that depends on all of the context: its length, its first and last token,
    and the token."""
    return -(1 + (context[0] * 31 + context[-1] * 7 + len(context) * 3 + token) % 101) / 50


class Chatting(Characters):
    """A tokenizer with a chat template, which writes BOS itself, as real ones do; it knows no
    tools."""

    chat_template: str | None = "yes"

    def apply_chat_template(
        self, messages: Sequence[Any], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and add_generation_prompt
        if any(message["role"] == "tool" for message in messages):
            raise ValueError("no tools here")
        return (
            "\x01"
            + "".join(f"<{message['role']}>{message['content']}" for message in messages)
            + "<assistant>"
        )


class ToyEngine:
    """Scores with `rule(context, token)`, sums over a continuation, and remembers what it was
    asked.

    It writes `says(prompt)`, of whose characters each is one token, until a stop token or the
    limit.
    """

    def __init__(
        self,
        rule: Rule = by_position,
        tokenizer: Characters | None = None,
        says: Callable[[str], str] = lambda prompt: "",
        lam: float | None = 0.5,
        **more: Any,
    ):
        self.rule = rule
        self.tokenizer = tokenizer or Characters()
        self.says = says
        self.weights: Any = SimpleNamespace(lam=lam)
        self.asked: list[list[tuple[list[int], list[int]]]] = []
        self.prompted: list[Sequence[list[int]]] = []
        self.configs: list[Generation] = []
        self.__dict__.update(more)

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        self.asked.append(list(pairs))
        assert all(context and continuation for context, continuation in pairs)
        return [
            Continuation(
                sum(self.rule(context + answer[:i], answer[i]) for i in range(len(answer))), False
            )
            for context, answer in pairs
        ]

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        self.prompted.append(prompts)
        self.configs.append(config)
        assert all(prompts)
        return [self._spoken(prompt, config) for prompt in prompts]

    def _spoken(self, prompt: list[int], config: Generation) -> list[int]:
        ids = [ord(character) for character in self.says(self.tokenizer.decode(prompt))][
            : config.max_new_tokens
        ]
        ends = [ids.index(stop) for stop in config.stop if stop in ids]
        return ids[: min(ends)] if ends else ids

    def on_weights_changed(self) -> None: ...
