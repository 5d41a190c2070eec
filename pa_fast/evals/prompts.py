"""Prompts that fit the model: a text, or the turns of a chat, that the model continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pa_fast.base import Tokenizer
from pa_fast.errors import EvaluatorError
from pa_fast.evals.rows import DataRow
from pa_fast.evals.scores import Encoder

R = TypeVar("R")

POLICIES = ("refuse", "skip", "truncate")
WITH_SHOTS = (*POLICIES, "fewer-shots")
_DID = {
    "skip": ("items_skipped", "are left out"),
    "truncate": ("prompts_truncated", "lose the beginning of their prompt"),
    "fewer-shots": ("items_with_fewer_shots", "are shown fewer shots"),
}
_OFFER = {
    "skip": "leaves them out",
    "truncate": "cuts prompts on the left",
    "fewer-shots": "shows them as many shots as fit",
}


@dataclass(frozen=True)
class Fitted(Generic[R]):
    """Requests that fit the model.

    Attributes:
        kept: indices of the items that are not left out.
        requests: their requests.
        figures: numbers of items that were changed or left out, for the details of a score; empty
            where such are refused.
        notes: the same in words.
    """

    kept: list[int]
    requests: list[R]
    figures: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class Overflow(Generic[R]):
    """The requests of one evaluator's items, and the policy for those that do not fit the model.

    Attributes:
        policies: those that the evaluator has; `policy` is one of them.
        wheres: a name for each item.
        shots: the number of shots of each item.
        make: (item, shots left out) → its request.
        length: request → positions that it takes.
        cut: (request, count) → the request without `count` tokens at the beginning of its prompt,
            None where that leaves no prompt.
        advice: positions of the longest item → further hints, shown first.
        new: how many of the positions are for new tokens.
    """

    policy: str
    policies: Sequence[str]
    wheres: Sequence[str]
    shots: Sequence[int]
    make: Callable[[int, int], R]
    length: Callable[[R], int]
    cut: Callable[[R, int], R | None]
    advice: Callable[[int], Sequence[str]] = lambda longest: ()
    new: int = 0

    def fit(self, positions: int | None) -> Fitted[R]:
        """Return every item's request, none longer than `positions`; None: of any length.

        Raises:
            EvaluatorError: items do not fit, with their number and the longest one; or a request
                cannot be made.
        """
        requests = each(range(len(self.wheres)), lambda index: self.make(index, 0), "items")
        lengths = list(map(self.length, requests))
        long = {
            index
            for index, length in enumerate(lengths)
            if positions is not None and length > positions
        }
        changed = {
            index: self._changed(index, requests[index], positions, self.policy)
            for index in long
            if positions is not None
        }
        lost = [index for index, request in changed.items() if request is None]
        if positions is not None and lost and (self.policy != "skip" or len(lost) == len(requests)):
            raise self._refused(requests, lost, len(long), positions)
        final = [(index, changed.get(index, request)) for index, request in enumerate(requests)]
        kept = [(index, request) for index, request in final if request is not None]
        figures, notes = {}, []
        if self.policy != "refuse":
            key, words = _DID[self.policy]
            figures[key] = float(len(long))
            if long:
                notes.append(
                    f"{len(long)} of {len(requests)} items are too long for {positions} positions"
                    f" and {words}"
                )
        return Fitted(
            [index for index, _ in kept], [request for _, request in kept], figures, notes
        )

    def _changed(self, index: int, request: R, positions: int, policy: str) -> R | None:
        """Return the request of an item that is too long, changed by `policy`; None where the item
        is left out."""
        if policy == "truncate":
            return self.cut(request, self.length(request) - positions)
        if policy == "fewer-shots":
            for dropped in range(1, self.shots[index] + 1):
                shorter = self.make(index, dropped)
                if self.length(shorter) <= positions:
                    return shorter
        return None

    def _bare(self, index: int, whole: int) -> int:
        """Return the length of an item without its shots; `whole` where it has none, or needs
        them."""
        try:
            shots = self.shots[index]
            return self.length(self.make(index, shots)) if shots else whole
        except EvaluatorError:
            return whole

    def _refused(
        self, requests: Sequence[R], lost: Sequence[int], long: int, positions: int
    ) -> EvaluatorError:
        """Return the error that the items `lost` do not fit, with hints that were tried on them.
        `long` is the number of items that are too long without a policy."""
        whole = {index: self.length(requests[index]) for index in lost}
        bare = {index: self._bare(index, whole[index]) for index in lost}
        least = bare if self.policy == "fewer-shots" else whole
        longest = max(lost, key=lambda index: least[index])
        fits = {
            "skip": long < len(requests),
            "truncate": all(
                self._changed(index, requests[index], positions, "truncate") is not None
                for index in lost
            ),
            "fewer-shots": any(self.shots) and max(bare.values()) <= positions,
        }
        ways = [
            *self.advice(least[longest]),
            *(
                f"overflow={policy} {_OFFER[policy]}"
                for policy in self.policies
                if policy != self.policy and fits.get(policy)
            ),
        ]
        if "fewer-shots" in self.policies and fits["fewer-shots"]:
            ways.append("take fewer shots=")
        return EvaluatorError(
            f"{len(lost)} of {len(requests)} items do not fit the model, which has positions for"
            f" {positions} tokens"
            + (f", even with overflow={self.policy}" if self.policy != "refuse" else "")
            + f": the longest, {self.wheres[longest]}, takes {whole[longest]}"
            + (f" ({self.new} of them new)" if self.new else "")
            + (f", and {bare[longest]} without shots" if bare[longest] < whole[longest] else ""),
            "; or ".join(ways) or f"shorten them: the model sees no more than {positions} tokens",
        )


T = TypeVar("T")


def each(things: Sequence[T], make: Callable[[T], R], what: str) -> list[R]:
    """Return `make` of all `things`.

    Raises:
        EvaluatorError: the first one that `make` raises, with the number of all.
    """
    results: list[R] = []
    errors: list[EvaluatorError] = []
    for thing in things:
        try:
            results.append(make(thing))
        except EvaluatorError as error:
            errors.append(error)
    if errors:
        first = errors[0]
        more = (
            f" (the first of {len(errors)} that are refused, of {len(things)} {what})"
            if len(errors) > 1
            else ""
        )
        raise EvaluatorError(first.message + more, first.hint) from first.__cause__
    return results


def cut_left(ids: list[int], count: int, prefix: list[int]) -> list[int] | None:
    """Return `ids` without `count` tokens at the beginning, but with `prefix` if they have it; None
    where no token would be left."""
    kept = len(prefix) if ids[: len(prefix)] == prefix else 0
    short = ids[:kept] + ids[kept + count :]
    return short if len(ids) > count + kept or (kept and len(ids) == count + kept) else None


# --- prompts


@dataclass(frozen=True)
class Prompt:
    """A text as it is, or messages for the tokenizer's chat template; `where` names it in
    errors."""

    where: str
    content: str | Sequence[Mapping[str, str]]


def chat(where: str, text: str) -> Prompt:
    """Return a prompt of one message of the user."""
    return Prompt(where, [{"role": "user", "content": text}])


def read_prompt(row: DataRow, as_chat: bool) -> Prompt:
    """Return the prompt of a row: its field `prompt`, or `messages`, a list of `{"role": …,
    "content": …}`.

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
    """The limit of new tokens behind each prompt.

    Attributes:
        most: the limit.
        capped: lower it to the positions that the longest prompt leaves; else prompts that leave
            fewer than `most` do not fit.
    """

    most: int
    capped: bool

    @property
    def identity(self) -> int | str:
        """The limit as a run records it."""
        return f"{self.most} at most" if self.capped else self.most

    def least(self, positions: int | None, overflow: str) -> int:
        """Return how many tokens must fit behind each prompt. Where prompts may be changed or left
        out, that is a quarter of the positions: a prompt that leaves one token would cap all
        answers."""
        if not self.capped:
            return self.most
        return (
            1
            if positions is None or overflow == "refuse"
            else min(self.most, max(1, positions // 4))
        )


@dataclass(frozen=True)
class FittedPrompts:
    """Prompts that fit the model.

    Attributes:
        kept: indices of the prompts that are not left out.
        texts, ids: each as the model sees it, as text and tokens.
        new_tokens: the limit behind all of them.
        figures, notes: those of `Fitted`, and those of a lowered limit.
    """

    kept: list[int]
    texts: list[str]
    ids: list[list[int]]
    new_tokens: int
    figures: dict[str, float]
    notes: list[str]


def written(tokenizer: Tokenizer, prompt: Prompt) -> tuple[str, list[int]]:
    """Return text and tokens of `prompt`. A chat template writes special tokens itself; other texts
    get BOS as the tokenizer has it, once.

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
    positions: int | None,
    prompts: Sequence[Prompt],
    new_tokens: NewTokens,
    overflow: str,
    policies: Sequence[str] = POLICIES,
    shorter: Callable[[int, int], Prompt] | None = None,
    shots: Sequence[int] | None = None,
) -> FittedPrompts:
    """Return `prompts` that leave positions for new tokens behind each.

    Args:
        positions: of the model; None where it does not say.
        overflow: policy for prompts that leave too few, one of `policies`.
        shorter: (prompt, shots left out) → prompt, where prompts have `shots`.

    Raises:
        EvaluatorError: see `written`, `Overflow.fit`.
    """
    prefix = Encoder(tokenizer).prefix
    least = new_tokens.least(positions, overflow)

    def make(index: int, dropped: int) -> tuple[str, list[int]]:
        return written(
            tokenizer,
            shorter(index, dropped) if shorter is not None and dropped else prompts[index],
        )

    def cut(request: tuple[str, list[int]], count: int) -> tuple[str, list[int]] | None:
        ids = cut_left(request[1], count, prefix)
        return None if ids is None else (request[0], ids)

    def advice(longest: int) -> list[str]:
        if positions is None or new_tokens.capped:
            return []
        shortest = max(1, len(prefix)) if overflow == "truncate" else longest - least
        if shortest < positions:
            return [
                f"max_new_tokens={positions - shortest} or less leaves room behind every prompt"
            ]
        # no prompt leaves so many positions, however it is cut
        both = f"max_new_tokens={positions // 2},overflow=truncate cuts prompts on the left"
        return [both] if new_tokens.most >= positions else []

    outcome = Overflow(
        overflow,
        policies,
        [prompt.where for prompt in prompts],
        [0] * len(prompts) if shots is None else shots,
        make,
        lambda request: len(request[1]) + least,
        cut,
        advice,
        least,
    ).fit(positions)
    texts, ids = zip(*outcome.requests)
    longest = max(range(len(ids)), key=lambda k: len(ids[k]))
    count = new_tokens.most
    if new_tokens.capped and positions is not None:
        count = min(count, positions - len(ids[longest]))
    figures, notes = outcome.figures, outcome.notes
    if count < new_tokens.most:
        figures = {**figures, "max_new_tokens": float(count)}
        notes = [
            *notes,
            (
                f"answers have at most {count} tokens, not {new_tokens.most}: no more fit the model"
                f" behind the longest prompt, {prompts[outcome.kept[longest]].where}, of"
                f" {len(ids[longest])} tokens"
            ),
        ]
    return FittedPrompts(outcome.kept, list(texts), list(ids), count, figures, notes)


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
