"""Items that are too long for the model: found before the first λ, and refused, left out, cut, or
shown fewer shots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pa_fast.errors import EvaluatorError

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
    """What is asked of the model.

    Attributes:
        kept: which of the items are asked.
        requests: their requests.
        figures: how many items were changed or left out, for the details of a score; empty where
            such are refused.
        notes: the same in words.
    """

    kept: list[int]
    requests: list[R]
    figures: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class Overflow(Generic[R]):
    """How the items of one evaluator are asked, and what becomes of those that do not fit.

    Attributes:
        policies: what the evaluator offers; `policy` is one of them.
        wheres: a name for each item.
        shots: how many shots each item has.
        make: (item, shots left out) → its request.
        length: positions that a request takes.
        cut: a request with so many tokens fewer at the beginning of its prompt, None where that
            leaves no prompt.
        advice: what else makes items fit, of which the longest takes so many positions; said first.
        new: how many of the positions are for what the model writes.
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

    def fit(self, room: int | None) -> Fitted[R]:
        """Every item's request, none longer than `room` positions; None: whatever their length.

        Raises:
            EvaluatorError: items do not fit, with their number and the longest one; or a request
                cannot be made.
        """
        made = each(range(len(self.wheres)), lambda index: self.make(index, 0), "items")
        lengths = list(map(self.length, made))
        long = {index for index, length in enumerate(lengths) if room is not None and length > room}
        changed = {
            index: self._changed(index, made[index], room, self.policy)
            for index in long
            if room is not None
        }
        lost = [index for index, request in changed.items() if request is None]
        if room is not None and lost and (self.policy != "skip" or len(lost) == len(made)):
            raise self._refused(made, lost, len(long), room)
        final = [(index, changed.get(index, request)) for index, request in enumerate(made)]
        kept = [(index, request) for index, request in final if request is not None]
        figures, notes = {}, []
        if self.policy != "refuse":
            key, words = _DID[self.policy]
            figures[key] = float(len(long))
            if long:
                notes.append(
                    f"{len(long)} of {len(made)} items are too long for {room} positions and"
                    f" {words}"
                )
        return Fitted(
            [index for index, _ in kept], [request for _, request in kept], figures, notes
        )

    def _changed(self, index: int, request: R, room: int, policy: str) -> R | None:
        """The request of an item that is too long, as `policy` has it; None where it is not to be
        asked."""
        if policy == "truncate":
            return self.cut(request, self.length(request) - room)
        if policy == "fewer-shots":
            for dropped in range(1, self.shots[index] + 1):
                shorter = self.make(index, dropped)
                if self.length(shorter) <= room:
                    return shorter
        return None

    def _bare(self, index: int, whole: int) -> int:
        """How long an item is without its shots; `whole` where it has none, or cannot be asked
        without."""
        try:
            shots = self.shots[index]
            return self.length(self.make(index, shots)) if shots else whole
        except EvaluatorError:
            return whole

    def _refused(
        self, made: Sequence[R], lost: Sequence[int], long: int, room: int
    ) -> EvaluatorError:
        """That the items `lost` do not fit, and what would make all fit: nothing is offered that
        was not tried on them. `long` items are too long as they are."""
        whole = {index: self.length(made[index]) for index in lost}
        bare = {index: self._bare(index, whole[index]) for index in lost}
        least = bare if self.policy == "fewer-shots" else whole
        longest = max(lost, key=lambda index: least[index])
        fits = {
            "skip": long < len(made),
            "truncate": all(
                self._changed(index, made[index], room, "truncate") is not None for index in lost
            ),
            "fewer-shots": any(self.shots) and max(bare.values()) <= room,
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
            f"{len(lost)} of {len(made)} items do not fit the model, which has positions for"
            f" {room} tokens"
            + (f", even with overflow={self.policy}" if self.policy != "refuse" else "")
            + f": the longest, {self.wheres[longest]}, takes {whole[longest]}"
            + (f" ({self.new} of them new)" if self.new else "")
            + (f", and {bare[longest]} without shots" if bare[longest] < whole[longest] else ""),
            "; or ".join(ways) or f"shorten them: the model sees no more than {room} tokens",
        )


T = TypeVar("T")


def each(things: Sequence[T], make: Callable[[T], R], what: str) -> list[R]:
    """`make` of all `things`.

    Raises:
        EvaluatorError: that of the first one that is refused, with how many are.
    """
    made: list[R] = []
    errors: list[EvaluatorError] = []
    for thing in things:
        try:
            made.append(make(thing))
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
    return made


def cut_left(ids: list[int], count: int, prefix: list[int]) -> list[int] | None:
    """`ids` without `count` of the tokens behind `prefix`, which they may begin with; None where no
    token would be left."""
    kept = len(prefix) if ids[: len(prefix)] == prefix else 0
    short = ids[:kept] + ids[kept + count :]
    return short if len(ids) > count + kept or (kept and len(ids) == count + kept) else None
