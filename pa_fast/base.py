"""Page one: the protocols that pa_fast's parts meet through, and the values that pass between them.

An embedder implements `Engine` (a model at some λ that can score and speak) or `Evaluator` (a
function of an engine that returns a `Score`). The driver in `pa_fast.sweep` knows nothing else of
either.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

from pa_fast.errors import UsageError

# Exponents of at most three digits: Fraction would write out 10^999999999 in full.
_NUMBER = re.compile(
    r"\s*[+-]?(\d{1,400}/\d{1,400}|(\d{1,400}\.?\d{0,400}|\.\d{1,400})([eE][+-]?\d{1,3})?)\s*",
    re.ASCII,
)


# Of numerator and denominator together: files hold and read keys of up to 400 characters, and
# Python refuses to print integers of more than 4,300 digits.
_MOST_BITS = 1300


class Lambda(float):
    """One λ: a float that remembers its exact value, so that 0.3 is 0.3 and 1/3 is 1/3 in every
    file.

    Made from text, an integer, a Fraction or anything that `float` takes (its shortest decimal
    counts as exact). `key` is the normalised decimal (`0.3`, `-0.2`, `1`) or, where no decimal
    ends, the fraction (`1/3`).
    """

    exact: Fraction

    def __new__(cls, value: Any) -> Lambda:
        if isinstance(value, Lambda):
            return value
        if isinstance(value, str) and not _NUMBER.fullmatch(value):
            raise _no_number(value)
        try:
            exact = Fraction(
                value if isinstance(value, (str, int, Fraction)) else repr(float(value))
            )
        except (ValueError, TypeError, ZeroDivisionError, OverflowError):
            raise _no_number(value) from None
        if exact.numerator.bit_length() + exact.denominator.bit_length() > _MOST_BITS:
            raise UsageError(
                "a λ has more than 390 digits", "write a decimal or a fraction, such as 0.6 or 1/3"
            )
        try:
            number = float(exact)
        except OverflowError:
            number = math.inf
        if not abs(number) <= 3.4028234663852886e38 or (exact and not number):
            raise UsageError(
                f"λ `{_shown(value)}` does not fit in fp32, in which every merge is computed",
                "use a smaller λ",
            )
        self = super().__new__(cls, number)
        self.exact = exact
        return self

    def __reduce__(self) -> tuple[type[Lambda], tuple[Fraction]]:
        return (Lambda, (self.exact,))

    @functools.cached_property
    def key(self) -> str:
        """λ as every file spells it."""
        twos = fives = 0
        rest = self.exact.denominator
        while rest % 2 == 0:
            rest, twos = rest // 2, twos + 1
        while rest % 5 == 0:
            rest, fives = rest // 5, fives + 1
        places = max(twos, fives)
        if rest != 1 or places > 30:
            return f"{self.exact.numerator}/{self.exact.denominator}"
        digits = str(abs(self.exact.numerator) * 10**places // self.exact.denominator).rjust(
            places + 1, "0"
        )
        sign = "-" if self.exact < 0 else ""
        return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def _no_number(value: object) -> UsageError:
    return UsageError(
        f"λ `{_shown(value)}` is not a finite number",
        "write a decimal or a fraction, such as 0.6 or 1/3",
    )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "…"


@dataclass(frozen=True)
class Continuation:
    """What a model thinks of one continuation: its log-likelihood in nats, and whether greedy
    decoding says it."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Generation:
    """How to generate, one configuration for all λ: greedy, at most `max_new_tokens`, ending at any
    `stop` id."""

    max_new_tokens: int
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Item:
    """One scored item; items are the same at every λ.

    Intervals along λ are computed from items, where these make up the reported value: as
    Σ weight · score / Σ weight, as the mean over groups of each one's mean, or from `parts`.

    Attributes:
        group: the task that it belongs to.
        weight: what it counts in the value, the same at every λ.
        parts: of a metric that is no mean of items, the figures whose sums over a group make it:
            `numerator`, `denominator`; `tp`, `fp`, `fn` (F1); with `tn` (Matthews' correlation);
            `nats`, `tokens` (perplexity). Groups are averaged by the sums of their weights.
    """

    id: str
    group: str
    score: float
    weight: float = 1.0
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Score:
    """An evaluator's answer: `value` in `unit` over `n` items, and the items themselves.

    `details` are further figures of the same evaluation, such as the share of truncated outputs;
    they go to the journal and to results.json. `files` are texts by file name, such as what the
    model wrote; they are kept in the run folder.
    """

    value: float
    unit: str
    n: int
    items: Sequence[Item] = ()
    details: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that evaluators use."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class Weights(Protocol):
    """Weights that follow λ in place: what the driver needs of `pa_fast.LiveWeights`.

    With `check_lambda(lam)`, which raises where `set_lambda` would, a schedule past their reach
    fails before its first point.
    """

    @property
    def lam(self) -> float | None: ...

    def set_lambda(self, lam: float) -> None: ...

    def checksum(self) -> int: ...

    def verify(self) -> bool: ...

    def changed(self) -> list[str]: ...

    def effective_lambda(self) -> float: ...

    def memory(self) -> Any: ...


@runtime_checkable
class Engine(Protocol):
    """A model at some λ that can score and speak.

    With an attribute `on_progress` a sweep sets it to a function while an evaluator runs: call it
    with (requests done, requests in all) within `loglikelihood` and `generate`.
    """

    @property
    def weights(self) -> Weights:
        """The weights that follow λ, and their proof."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all λ."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score each (context ids, continuation ids); an empty context is the engine's to
        refuse."""
        ...

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """New token ids for each prompt, stop token excluded."""
        ...

    def on_weights_changed(self) -> None:
        """Drop whatever the old weights left behind; raise if that cannot be proven."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """A function of an engine. `name` is its column in every results file.

    With `check(engine)` a sweep asks it, before its first λ, for what would fail at every λ: it
    raises then, and else may return notes, texts that are shown once. It must leave the weights
    alone.
    """

    name: str
    higher_is_better: bool

    def __call__(self, engine: Engine) -> Score: ...


def identity(thing: object) -> Mapping[str, Any]:
    """What must be equal for two runs to be one: `thing.identity` if it has one, else nothing.

    Engines and evaluators may offer an `identity` mapping of JSON values; a sweep refuses to resume
    over a different one and says what differs.
    """
    return getattr(thing, "identity", {})


def configuration(thing: object) -> Mapping[str, Any]:
    """What a run should record of `thing` without being bound to it, such as folders and the
    device."""
    return getattr(thing, "configuration", {})


def positions(engine: Engine) -> int | None:
    """The most tokens that the engine's model sees at once: `engine.positions`, None where it does
    not say."""
    count: int | None = getattr(engine, "positions", None)
    return count


def stop_tokens(engine: Engine) -> tuple[int, ...]:
    """Ids that end a generated text at every λ: `engine.stop_tokens` if it has them, else the
    tokenizer's end of sequence.

    An engine of two models stops at the stop tokens of both, so that no λ is cut short or runs on
    by the other's habits.
    """
    own = getattr(engine, "stop_tokens", None)
    if own is not None:
        return tuple(own)
    eos = engine.tokenizer.eos_token_id
    return () if eos is None else (eos,)
