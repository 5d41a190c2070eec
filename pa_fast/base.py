"""The protocols between the parts of pa_fast, and the values that pass between them.

An embedder implements `Engine` (a model at some λ that can score and generate) or `Evaluator` (a
function of an engine that returns a `Score`), and may implement further members of
`CompleteEngine`, `CompleteWeights` and `CompleteEvaluator`. `complete` and `complete_evaluator` add
the rest where an object of a caller comes in, so that no later code asks whether a member exists.
The driver in `pa_fast.sweep` uses nothing else of either.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Protocol, cast, runtime_checkable

from pa_fast.errors import EngineError, UsageError, WeightsError

# Exponents of at most three digits: Fraction would write out 10^999999999 in full.
NUMBER = re.compile(
    r"\s*[+-]?(\d{1,400}/\d{1,400}|(\d{1,400}\.?\d{0,400}|\.\d{1,400})([eE][+-]?\d{1,3})?)\s*",
    re.ASCII,
)


# Of numerator and denominator together: files hold and read keys of up to 400 characters, and
# Python refuses to print integers of more than 4,300 digits.
_MOST_BITS = 1300


class Lambda(float):
    """One λ: a float that keeps its exact value, so that 0.3 is 0.3 and 1/3 is 1/3 in every file.

    It is made from text, an integer, a Fraction or anything that `float` takes (whose shortest
    decimal counts as exact). `key` is the normalised decimal (`0.3`, `-0.2`, `1`) or, if the
    decimal does not end, the fraction (`1/3`).

    Example:
        lam = pa_fast.Lambda("1/3")
        lam.key, lam.exact  # ('1/3', Fraction(1, 3))
    """

    exact: Fraction

    def __new__(cls, value: Any) -> Lambda:
        if isinstance(value, Lambda):
            return value
        if is_truth(value) or (isinstance(value, str) and not NUMBER.fullmatch(value)):
            raise _no_number(value)
        try:
            exact = Fraction(
                value if isinstance(value, (str, int, Fraction)) else repr(float(value))
            )
        except (ValueError, TypeError, ZeroDivisionError, OverflowError):
            raise _no_number(value) from None
        try:
            number = float(exact)
        except OverflowError:
            number = math.inf
        if not abs(number) <= 3.4028234663852886e38 or (exact and not number):
            raise UsageError(
                f"λ `{_shown(value)}` does not fit in fp32, in which every merge is computed",
                "use 0, or a λ further from it" if exact and not number else "use a smaller λ",
            )
        if exact.numerator.bit_length() + exact.denominator.bit_length() > _MOST_BITS:
            raise UsageError(
                "a λ has more than 390 digits", "write a decimal or a fraction, such as 0.6 or 1/3"
            )
        self = super().__new__(cls, number)
        self.exact = exact
        return self

    def __reduce__(self) -> tuple[type[Lambda], tuple[Fraction]]:
        return (Lambda, (self.exact,))

    @functools.cached_property
    def key(self) -> str:
        """λ as it is written in every file."""
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


def is_truth(value: object) -> bool:
    """Return whether `value` is True or False, also as a scalar of NumPy or torch. Python counts
    both as numbers; as a λ they are mistakes."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).rpartition(".")[2] == "bool"


def _no_number(value: object) -> UsageError:
    return UsageError(
        f"λ `{_shown(value)}` is not a finite number",
        "write a decimal or a fraction, such as 0.6 or 1/3",
    )


def _shown(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = "of thousands of digits"
    return text if len(text) <= 60 else text[:60] + "…"


BASE, INSTRUCT = Lambda(0), Lambda(1)
"""The λ at which the weights are those of a side."""


@dataclass(frozen=True)
class Continuation:
    """A model's score of one continuation: its log-likelihood in nats, and whether greedy decoding
    gives it."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Generation:
    """Configuration of a generation, the same for all λ: greedy unless `temperature` says
    otherwise.

    Attributes:
        max_new_tokens: the most tokens of an output.
        stop: ids that end an output, and are left out of it.
        n: outputs per prompt; more than one only where they are sampled.
        temperature: 0 is greedy decoding; above it tokens are sampled from the softmax of
            logits / temperature.
        top_p: sample from the fewest tokens whose probabilities sum to at least this, in (0, 1].
        seed: with one, equal calls at one λ give equal outputs; 0 to 2⁶³ − 1.

    Raises:
        UsageError: `n`, `temperature`, `top_p` or `seed` is out of its range, or greedy decoding
            would ignore it.
    """

    max_new_tokens: int
    stop: tuple[int, ...] = ()
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (_is_a(Integral, self.n) and self.n >= 1):
            raise UsageError(f"n = {_shown(self.n)}, expected a whole number of at least 1")
        if not (_is_a(Real, self.temperature) and 0 <= self.temperature < math.inf):
            raise UsageError(
                f"temperature = {_shown(self.temperature)}, expected a finite number of at least 0",
                "0 is greedy decoding",
            )
        if not (_is_a(Real, self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(
                f"top_p = {_shown(self.top_p)}, expected a number above 0 and up to 1",
                "1 samples from all tokens",
            )
        if self.seed is not None and not (_is_a(Integral, self.seed) and 0 <= self.seed < 2**63):
            raise UsageError(
                f"seed = {_shown(self.seed)}, expected a whole number from 0 to 2^63 - 1, or None"
            )
        for name in ("n", "top_p"):
            if self.is_greedy and getattr(self, name) != 1:
                raise UsageError(
                    f"{name} = {getattr(self, name)} does nothing at temperature 0",
                    "greedy decoding has one output; sample with a temperature above 0",
                )

    @property
    def is_greedy(self) -> bool:
        """True where nothing is drawn at random."""
        return self.temperature == 0

    def check_greedy(self, engine: str) -> None:
        """Raise EngineError unless the outputs are greedy; for an `engine` that cannot sample, by
        its name, before it computes."""
        if not self.is_greedy:
            raise EngineError(
                f"{engine} cannot sample: found temperature = {self.temperature}, n = {self.n},"
                f" top_p = {self.top_p}, seed = {self.seed}; it decodes greedily",
                "leave temperature at 0, or take an engine that samples",
            )


def _is_a(kind: type, value: object) -> bool:
    """Return whether `value` is a number of `kind`; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Item:
    """One scored item; items are the same at every λ.

    Intervals along λ are computed from items, if these make up the reported value: as
    Σ weight · score / Σ weight, as the mean over groups of the mean of each, or from `parts`.

    Attributes:
        group: the task that it belongs to.
        weight: its weight in the value, the same at every λ.
        parts: for a metric that is not a mean of items, figures whose sums over a group make it:
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
    """Result of an evaluator: `value` in `unit` over `n` items, and the items themselves.

    `details` are further figures of the same evaluation, such as the share of truncated outputs;
    they go to the journal and to results.json. `files` are texts by file name, such as the outputs
    of the model; they are kept in the run folder.
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
    """Weights that follow λ in place: the part of `pa_fast.LiveWeights` that a sweep requires."""

    @property
    def lam(self) -> float | None: ...

    def set_lambda(self, lam: float) -> None: ...

    def checksum(self) -> int: ...

    def verify(self) -> bool: ...

    def changed(self) -> list[str]: ...

    def effective_lambda(self) -> float: ...

    def memory(self) -> Any: ...


class CompleteWeights(Weights, Protocol):
    """Weights with all members that a sweep uses; the bodies are those that `complete` adds."""

    @property
    def rule(self) -> Any:
        """The `pa_fast.LambdaRule` of each tensor's present λ; None if all tensors have the
        same."""
        return None

    @property
    def followed(self) -> Any:
        """The rule that spreads a plain λ over the tensors. A run has one such rule."""
        return None

    def check_lambda(self, lam: float) -> None:
        """Raise as `set_lambda` would, so that a schedule outside the weights' range fails before
        its first point."""
        return None

    def read_back(self, merge_again: bool = False) -> int:
        """Return `checksum()`, after the weights were compared with what `set_lambda` should have
        written.

        Args:
            merge_again: compare them with a merge by other code than the switch's; without it, a
                comparison with sums of what was written is enough.

        Raises:
            WeightsError: they differ.
        """
        if not self.verify():
            raise WeightsError(
                f"the live weights at λ = {self.lam} differ from a fresh merge",
                "reload the pair; if it happens again, report it",
            )
        return self.checksum()

    def intended_lambda(self) -> float:
        """Return what `effective_lambda` would be without rounding."""
        return math.nan if self.lam is None else self.lam


@runtime_checkable
class Engine(Protocol):
    """A model at some λ that can score and generate: the protocol that an embedder implements."""

    @property
    def weights(self) -> Weights:
        """The weights that follow λ, and their verification."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all λ."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score each (context ids, continuation ids). The engine may refuse an empty context."""
        ...

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Return new token ids for each prompt, stop token excluded.

        P prompts give P · `config.n` outputs: those of prompt k are numbers k · n to (k + 1) · n
        - 1, whatever order they ended in. An engine that cannot sample begins with
        `config.check_greedy`.
        """
        ...

    def on_weights_changed(self) -> None:
        """Drop every state that depends on the old weights; raise if that cannot be ensured."""
        ...


class CompleteEngine(Engine, Protocol):
    """An engine with all members that sweeps and evaluators use; the bodies are those that
    `complete` adds."""

    @property
    def weights(self) -> CompleteWeights:
        """The weights that follow λ, and their verification."""
        ...

    on_progress: Callable[[int, int], object] | None = None
    """Called, unless None, with (requests done, requests in all) within `loglikelihood` and
    `generate`; a sweep sets it while an evaluator runs."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that are equal for two runs of one sweep: with others a sweep refuses to
        resume, and names the difference. The rule is part of the weights."""
        return {}

    @property
    def configuration(self) -> Mapping[str, Any]:
        """JSON values that a run records but may change, such as folders and the device."""
        return {}

    @property
    def notes(self) -> Sequence[str]:
        """Notes on the model, to show before a sweep."""
        return ()

    @property
    def model(self) -> Any:
        """The transformers model of the engine, if it has one; lm-eval computes with it."""
        return None

    @property
    def llm(self) -> Any:
        """The `vllm.LLM` of the engine, if it has one; lm-eval computes with it."""
        return None

    @property
    def positions(self) -> int | None:
        """The maximum number of tokens that the model sees at once; None if unknown."""
        return None

    @property
    def stop_tokens(self) -> Sequence[int]:
        """Ids that end a generated text at every λ: the tokenizer's end of sequence.

        An engine of two models stops at the stop tokens of both, so that texts end alike at every
        λ.
        """
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)


@runtime_checkable
class Evaluator(Protocol):
    """A function of an engine. `name` is its column in every results file."""

    name: str
    higher_is_better: bool

    def __call__(self, engine: Engine) -> Score: ...


class CompleteEvaluator(Evaluator, Protocol):
    """An evaluator with all members that a sweep uses; the bodies are those that
    `complete_evaluator` adds."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that are equal for two runs of one sweep; see `CompleteEngine.identity`."""
        return {}

    def check(self, engine: Engine) -> Iterable[str] | None:
        """Called before the first λ: raise errors that would occur at every λ, and return notes,
        which are shown once. It must not change the weights."""
        return None

    def item_count(self, engine: Engine) -> int | None:
        """Return the number of items of each score; None if it is not known before the first. It is
        called after `check`, where a sweep needs items: by `auto`, and by shares to keep."""
        return None


def complete(engine: Engine) -> CompleteEngine:
    """Return `engine` with every member of `CompleteEngine`, and its weights with every member of
    `CompleteWeights`: itself if it has them all, else a wrapper that adds the bodies of those that
    it lacks.

    Raises:
        UsageError: it is not an `Engine`.
    """
    if not isinstance(engine, Engine):
        raise UsageError(
            f"a {type(engine).__name__} is not an engine",
            "pass what pa_fast.load returns, or see pa_fast/base.py",
        )
    if _has_all(engine, CompleteEngine) and _has_all(engine.weights, CompleteWeights):
        return cast(CompleteEngine, engine)
    return cast(CompleteEngine, _AroundEngine(engine, CompleteEngine))


def complete_evaluator(evaluator: Evaluator) -> CompleteEvaluator:
    """Return `evaluator` with every member of `CompleteEvaluator`; see `complete`.

    Raises:
        UsageError: it is not an `Evaluator`.
    """
    if not isinstance(evaluator, Evaluator):
        raise UsageError(
            f"a {type(evaluator).__name__} is not an evaluator",
            "give it a name, higher_is_better and __call__(engine)",
        )
    if _has_all(evaluator, CompleteEvaluator):
        return cast(CompleteEvaluator, evaluator)
    return cast(CompleteEvaluator, _AroundEvaluator(evaluator, CompleteEvaluator))


def _has_all(thing: object, protocol: type) -> bool:
    return all(hasattr(thing, name) for name in vars(protocol) if not name.startswith("_"))


class _Around:
    """A wrapper with all members of `inner`, and the bodies of `protocol` for those that it
    lacks."""

    def __init__(self, inner: Any, protocol: type):
        vars(self).update(_inner=inner, _defaults=vars(protocol))

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._inner, name) or name not in self._defaults:
            return getattr(self._inner, name)
        default = self._defaults[name]
        return default.__get__(self) if hasattr(default, "__get__") else default

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self._inner, name) or name not in self._defaults:
            setattr(self._inner, name, value)
        else:
            vars(self)[name] = value

    def __repr__(self) -> str:
        return repr(self._inner)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the inner object, so that an evaluator recognises an engine of the caller's
        own class."""
        return type(self._inner)


def _passed_on(name: str) -> Any:
    """Return a property that reads the inner object's member. From Python 3.12 on, `isinstance`
    finds members of a protocol only on the class."""
    return property(lambda around: getattr(around._inner, name))


class _AroundEngine(_Around):
    tokenizer, loglikelihood = _passed_on("tokenizer"), _passed_on("loglikelihood")
    generate, on_weights_changed = _passed_on("generate"), _passed_on("on_weights_changed")

    @property
    def weights(self) -> Any:
        weights = self._inner.weights
        complete = _has_all(weights, CompleteWeights)
        return weights if complete else _Around(weights, CompleteWeights)


class _AroundEvaluator(_Around):
    name, higher_is_better = _passed_on("name"), _passed_on("higher_is_better")

    def __call__(self, engine: Engine) -> Score:
        score: Score = self._inner(engine)
        return score
