"""Text to token ids: what the tokenizer puts before a text, once, and nothing after it."""

from __future__ import annotations

from collections.abc import Sequence

from pa_fast.base import Tokenizer

_PROBE = "a"


class Encoder:
    """Encodes texts that a model is to go on from.

    `prefix` is what the tokenizer writes before a text, BOS in most cases. A text that begins with
    it, such as a prompt that was rendered by a chat template beforehand, does not get it again.
    What the tokenizer writes after a text, such as EOS or `[SEP]`, is left out: it would say that
    the text has ended.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.prefix = _prefix(tokenizer)

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids if _begins(ids, self.prefix) else self.prefix + ids

    def rendered(self, text: str) -> list[int]:
        """Ids of a text that a chat template wrote, with the special tokens that stand in it. A
        message that brought a prefix of its own right behind the template's does not make two of
        it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        bos = self._tokenizer.bos_token_id
        prefix = self.prefix or ([] if bos is None else [bos])
        while prefix and _begins(ids, prefix * 2):
            ids = ids[len(prefix) :]
        return ids


def _begins(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return bool(prefix) and list(ids[: len(prefix)]) == list(prefix)


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer writes before any text."""
    alone = tokenizer.encode(_PROBE, add_special_tokens=False)
    dressed = tokenizer.encode(_PROBE)
    for start in range(len(dressed) - len(alone) + 1) if alone else ():
        if dressed[start : start + len(alone)] == alone:
            return dressed[:start]
    # the tokenizer knows no such letter: the most that can be told is whether BOS stands first
    return dressed[:1] if dressed and dressed[0] == tokenizer.bos_token_id else []
