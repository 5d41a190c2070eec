"""The live weights of all workers of one engine, as seen from its driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pa_fast import errors
from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import combine
from pa_fast.errors import EngineError, UsageError, WeightsError
from pa_fast.live.memory import Memory
from pa_fast.rules import LambdaRule


class Workers:
    """Calls to the `WorkerWeights` of every worker. A subclass carries them there and back.

    Attributes:
        engine: the name of the engine, in messages.
    """

    engine: str

    def answers(self, method: str, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
        """Call `method` in every worker and return what `worker_weights.answer` did, by rank.

        Raises:
            EngineError: a call did not reach a worker, or its answer did not come back.
        """
        raise NotImplementedError

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` in every worker and return the results by rank.

        Raises:
            PaFastError: a worker raised it; that of the first such rank, with the rank where there
                are several.
            EngineError: see `answers`.
        """
        answers = self.answers(method, arguments)
        if not answers:
            raise EngineError(f"no worker of {self.engine} answered", "start the engine again")
        for rank, answer in enumerate(answers):
            if "error" in answer:
                name, message, hint = answer["error"]
                kind = getattr(errors, name, WeightsError)
                raise kind(f"rank {rank}: {message}" if len(answers) > 1 else message, hint)
        return [answer["value"] for answer in answers]

    def agreed(self, what: str, values: Sequence[Any]) -> Any:
        """Return the value that all ranks have.

        Raises:
            EngineError: they differ.
        """
        if any(value != values[0] for value in values):
            by_rank = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
            raise EngineError(
                f"the workers of {self.engine} differ in {what}: {by_rank}"[:500],
                "start the engine again",
            )
        return values[0]


class Closed(Workers):
    """The workers of an engine that was closed: no call reaches them."""

    def __init__(self, engine: str):
        self.engine = engine

    def answers(self, method: str, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
        """See `Workers.answers`."""
        raise EngineError(f"this {self.engine} engine was closed", "load the pair again")


class EngineWeights:
    """Implements `pa_fast.base.Weights` over the workers of one engine: all of them hold the same
    λ, or `lam` is None.

    Call `bind` or `join` before anything else.

    Args:
        workers: calls to them.
        idle: returns whether no request is unfinished.
        rule: the rule that the workers follow, or None.
    """

    def __init__(self, workers: Workers, idle: Callable[[], bool], rule: LambdaRule | None = None):
        self._workers, self._idle = workers, idle
        self._reports: list[dict[str, Any]] = []
        self.followed = rule
        self.rule: LambdaRule | None = None
        self._lam: Lambda | None = None
        self.switches = 0

    def bind(self, pair_arguments: Mapping[str, Any]) -> None:
        """Bind the pair in every worker; see `WorkerWeights.bind`."""
        self._workers.call("bind", pair_arguments)
        self.join()

    def join(self) -> None:
        """Read the reports of workers that are bound.

        Raises:
            PaFastError: one is not; if a proof failed when it was bound, that error.
        """
        self._reports = self._workers.call("report")

    def close(self) -> None:
        """Let no call reach the workers any more, whose engine is shut down."""
        self._lam, self.rule = None, None
        self._workers, self._idle = Closed(self._workers.engine), lambda: True

    @property
    def content(self) -> dict[str, str]:
        """The content fingerprint of each side's files, by side."""
        return dict(self._reports[0]["content"])

    @property
    def lam(self) -> float | None:
        """The λ that all workers hold, of a rule its swept one; None after a switch that did not
        finish everywhere."""
        return self._lam

    @property
    def store(self) -> str:
        """How the delta is held."""
        return str(self._reports[0]["store"])

    def check_lambda(self, lam: float | LambdaRule) -> None:
        """See `LiveWeights.check_lambda`."""
        self._workers.call("check_lambda", *_plain(lam))

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Write W(λ) into the parameters of every worker; returns when all have written it, on a
        GPU queued it.

        Answers of the engine are of this λ only after `ServedModel.on_weights_changed`, which drops
        the key-value blocks of the last one.

        Raises:
            EngineError: requests are unfinished (nothing was written), or the workers do not agree.
            UsageError, WeightsError: see `LiveWeights.set_lambda`.
        """
        key, rows = _plain(lam)
        if not self._idle():
            raise EngineError(
                f"λ was to be set while {self._workers.engine} computes requests",
                "wait for them: a request is answered at one λ",
            )
        before = self._lam, self.rule
        self._lam, self.rule = None, None
        try:
            held = self._workers.call("set_lambda", key, rows)
        except UsageError:  # of the argument: no worker has written
            self._lam, self.rule = before
            raise
        self.switches += 1
        if self._workers.agreed("λ", held) != key:
            raise WeightsError(
                f"{self._workers.engine}'s workers hold λ = {held[0]}, not {key}",
                "set λ again, or start anew",
            )
        self.rule = lam if isinstance(lam, LambdaRule) else self.followed and self.followed.at(lam)
        self._lam = Lambda(key)

    def load(self, side: str) -> None:
        """Load `side` as the engine loads a checkpoint: `lam` is None until λ is set again."""
        self._lam, self.rule = None, None
        self.switches += 1
        self._workers.call("load", side)

    def checksum(self) -> int:
        """Return the checksum of the live tensors of all workers; comparable between engines of
        the same number of ranks. The one of one rank is its own."""
        return self._combined(self._workers.call("checksum"))

    def read_back(self, merge_again: bool = False) -> int:
        """See `LiveWeights.read_back`; in every worker."""
        return self._combined(self._workers.call("read_back", merge_again))

    def _combined(self, sums: Sequence[str]) -> int:
        values = [int(total, 16) for total in sums]
        if len(values) == 1:
            return values[0]
        return combine({f"rank {r} of {len(values)}": value for r, value in enumerate(values)})

    def verify(self) -> bool:
        """Compare every bit in every worker with a fresh merge; returns True.

        Raises:
            WeightsError: a tensor differs (named), or no λ is set.
        """
        if wrong := self.changed():
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise WeightsError(
                f"live tensor `{wrong[0]}`{more} does not hold the merge at λ = {self._lam}",
                f"something else wrote to {self._workers.engine}'s parameters; set_lambda writes"
                " all of them again",
            )
        return True

    def changed(self) -> list[str]:
        """Return the names of tensors whose bits are not those of a fresh merge in some worker."""
        by_rank = self._workers.call("changed")
        return list(dict.fromkeys(name for names in by_rank for name in names))

    def effective_lambda(self) -> float:
        """See `LiveWeights.effective_lambda`; over the whole model, tensors that all workers have
        a copy of counted once."""
        return _ratio(self._distinct("projection"))

    def intended_lambda(self) -> float:
        """See `LiveWeights.intended_lambda`; over the whole model."""
        if self._lam is None or self.rule is None:
            return float("nan") if self._lam is None else float(self._lam)
        return _ratio(self._distinct("aim"))

    def _distinct(self, method: str) -> list[Sequence[float]]:
        """Return the sums of `method` of every rank, over tensors that no lower rank has too."""
        if len(self._reports) == 1:
            return self._workers.call(method)
        return self._workers.call(method, self._copies())

    def _copies(self) -> list[str]:
        """Return the names of tensors that are the same on all ranks, by the checksums of both
        sides."""
        first, *others = [report["sums"] for report in self._reports]
        return [
            name for name, sums in first.items() if all(one.get(name) == sums for one in others)
        ]

    def memory(self) -> Memory:
        """Return the bytes of all workers together."""
        parts = [report["memory"] for report in self._reports]
        return Memory(**{f.name: sum(int(p[f.name]) for p in parts) for f in fields(Memory)})

    def inventory(self) -> None:
        """Check that the models consist of the parameters that were bound; see
        `WorkerWeights.inventory`."""
        self._workers.call("inventory")

    def __repr__(self) -> str:
        return (
            f"<EngineWeights of {len(self._reports)} {self._workers.engine} workers at λ ="
            f" {self._lam}>"
        )


def _plain(lam: float | LambdaRule) -> tuple[str, Any]:
    if isinstance(lam, LambdaRule):
        return lam.lam.key, lam.document()
    return Lambda(lam).key, None


def _ratio(parts: Sequence[Sequence[float]]) -> float:
    moved, whole = (sum(column) for column in zip(*parts))
    return moved / whole if whole else float("nan")
