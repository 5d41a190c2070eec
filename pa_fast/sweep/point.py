"""One λ of a sweep: switch, prove, evaluate, prove again."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pa_fast.base import Engine, Evaluator, Item, Lambda, Score, Weights
from pa_fast.errors import EvaluatorError, PaFastError, RunError, WeightsError
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.process import Restored
from pa_fast.sweep.progress import Progress, listening

_HOST = socket.gethostname()


@dataclass(frozen=True)
class Record:
    """What came of one evaluator at one λ: its line for the journal, and what belongs into files of
    its own."""

    entry: Entry
    items: Sequence[Item] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Proof:
    """What the weights were when they were proven to be those of λ."""

    checksum: int
    effective_lambda: float | None
    intended_lambda: float | None
    switch_s: float


@dataclass(frozen=True)
class _Fault:
    """Why a point failed, as text: an exception would keep its frames alive, and with them the
    tensors they hold."""

    message: str
    traceback: str | None = None


def check_reach(engine: Engine, points: Iterable[Lambda]) -> None:
    """Refuse a schedule before its first point if one of its λ is outside what the weights can be
    set to, where they say so.

    Raises:
        UsageError: as the weights' own `check_lambda`.
    """
    check = getattr(engine.weights, "check_lambda", None)
    if check is not None:
        for lam in points:
            check(lam)


def check_recorded(engine: Engine, lam: Lambda, recorded: int) -> None:
    """Bring `engine` to λ, and compare its weights with the checksum that they had.

    Raises:
        RunError: they have another one.
    """
    engine.weights.set_lambda(lam)
    engine.on_weights_changed()
    _check_same(lam, recorded, engine.weights.checksum())


def visit(
    engine: Engine,
    lam: Lambda,
    evaluators: Sequence[Evaluator],
    recorded: int | None = None,
    progress: Progress | object | None = None,
) -> Iterator[Record]:
    """Bring `engine` to λ and run `evaluators` there, yielding what came of each before the next
    one starts.

    After one that writes to the weights, λ is set again; what one changes in the process is put
    back, see `Restored`. `recorded` is the checksum of the weights on which other points of this λ
    were finished, None where there are none.

    Raises:
        RunError: the switch gives weights with another checksum than `recorded`, or an evaluator
            changed something of the process that cannot be put back.
    """
    told = listening(progress)
    queue = list(evaluators)
    proof: _Proof | None = None
    intact = not queue
    while queue or not intact:
        try:
            proof = _switch(engine, lam, proof)
        except Exception as error:
            # No proof, no evaluation
            for evaluator in queue:
                yield Record(_entry(lam, evaluator, _fault(error)))
            return
        if recorded is not None:
            _check_same(lam, recorded, proof.checksum)
        intact = True
        told.switched(lam, proof.switch_s)
        while queue and intact:
            evaluator = queue.pop(0)
            told.evaluating(lam, evaluator.name)
            with _heard(engine, told):
                record, intact = _evaluate(engine, lam, evaluator, proof)
            yield record


@contextlib.contextmanager
def _heard(engine: Engine, progress: Progress) -> Iterator[None]:
    """Meanwhile `progress` hears how many of its requests the engine has done, if both take part in
    it."""
    within = getattr(progress, "within", None)
    if within is None or not hasattr(engine, "on_progress"):
        yield
        return
    before, engine.on_progress = engine.on_progress, within
    try:
        yield
    finally:
        engine.on_progress = before


def _check_same(lam: Lambda, recorded: int, found: int) -> None:
    if recorded != found:
        raise RunError(
            f"the run has other weights at λ = {lam.key}: recorded checksum {recorded:016x}, now"
            f" {found:016x}",
            "the checkpoints have changed since: choose another --out, or start afresh with"
            " --overwrite",
        )


def _switch(engine: Engine, lam: Lambda, before: _Proof | None) -> _Proof:
    """Set λ and prove it: against a fresh merge on the first visit, against the first visit's sum
    afterwards."""
    weights = engine.weights
    start = time.perf_counter()
    weights.set_lambda(lam)
    engine.on_weights_changed()
    switch_s = time.perf_counter() - start
    if before is None and not weights.verify():
        raise WeightsError(
            f"the live weights at λ = {lam.key} differ from a fresh merge",
            "reload the pair; if it happens again, report it",
        )
    checksum = weights.checksum()
    if before is None:
        return _Proof(checksum, _finite(weights.effective_lambda()), _intended(weights), switch_s)
    if checksum != before.checksum:
        raise WeightsError(
            f"setting λ = {lam.key} again did not restore the live weights",
            "reload the pair and run again",
        )
    return before


def _intended(weights: Weights) -> float | None:
    """What effective λ would be without rounding, where weights follow a rule and say so; else that
    is λ."""
    intended = getattr(weights, "intended_lambda", None)
    return (
        None if getattr(weights, "rule", None) is None or intended is None else _finite(intended())
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _evaluate(
    engine: Engine, lam: Lambda, evaluator: Evaluator, proof: _Proof
) -> tuple[Record, bool]:
    """Run one evaluator, put the process back, and tell whether the weights are as they were. The
    sum of `proof` is the sum before: nothing but evaluators runs between two of them, and each is
    followed by a sum of its own.
    """
    score: Score | None = None
    fault: _Fault | None = None
    with Restored(f"evaluator `{evaluator.name}`") as process:
        start = time.perf_counter()
        try:
            score = _checked(evaluator.name, evaluator(engine))
        except (Exception, SystemExit) as error:
            fault = _fault(error)
        eval_s = time.perf_counter() - start
    try:
        intact = engine.weights.checksum() == proof.checksum
        if intact:
            # the weights are what they were: is the model still made of them?
            engine.on_weights_changed()
        else:
            fault = _written(evaluator.name, lam, engine.weights, fault)
    except Exception as error:
        left = _fault(error)
        intact, fault = (
            False,
            _Fault(
                f"evaluator `{evaluator.name}` changed the model: {left.message}", left.traceback
            ),
        )
    entry = replace(
        _entry(lam, evaluator, fault or score, proof, eval_s), restored=process.changed or None
    )
    if score is None or fault is not None:
        return Record(entry), intact
    return Record(entry, score.items, score.files), intact


def _entry(
    lam: Lambda,
    evaluator: Evaluator,
    outcome: Score | _Fault | None,
    proof: _Proof | None = None,
    eval_s: float | None = None,
) -> Entry:
    score = outcome if isinstance(outcome, Score) else None
    fault = outcome if isinstance(outcome, _Fault) else None
    assert score is not None or fault is not None
    return Entry(
        lam=lam.key,
        evaluator=evaluator.name,
        score=None if score is None else score.value,
        unit=None if score is None else score.unit,
        n=None if score is None else score.n,
        details=None if score is None or not score.details else dict(score.details),
        error=None if fault is None else fault.message,
        traceback=None if fault is None else fault.traceback,
        checksum=None if proof is None else proof.checksum,
        effective_lambda=None if proof is None else proof.effective_lambda,
        intended_lambda=None if proof is None else proof.intended_lambda,
        switch_s=None if proof is None else proof.switch_s,
        eval_s=eval_s,
        host=_HOST,
    )


def _fault(error: BaseException) -> _Fault:
    if isinstance(error, PaFastError):
        return _Fault(str(error))
    try:
        return _Fault(
            f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        )
    except Exception:  # an exception of the user's own may fail to print itself
        return _Fault(f"{type(error).__name__}, whose message cannot be printed")


def _written(name: str, lam: Lambda, weights: Weights, fault: _Fault | None) -> _Fault:
    now = weights.lam
    if now is None or float(now) != float(lam):
        message = (
            f"evaluator `{name}` left the live weights at λ = {now}, and found them at {lam.key}"
        )
    else:
        changed = weights.changed()
        shown = ", ".join(changed[:3]) + (
            f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        )
        message = (
            f"evaluator `{name}` wrote to the live weights: {shown or 'their checksum changed'}"
        )
    return (
        _Fault(message)
        if fault is None
        else _Fault(f"{message}; it also failed: {fault.message}", fault.traceback)
    )


def _checked(name: str, score: object) -> Score:
    """`score` with plain numbers, if it is one that can be recorded and compared."""
    if not isinstance(score, Score):
        raise EvaluatorError(
            f"evaluator `{name}` returned a {type(score).__name__} instead of a pa_fast.Score"
        )
    if isinstance(score.value, (str, bool)) or isinstance(score.n, (str, bool)):
        raise EvaluatorError(
            f"evaluator `{name}` scored {score.value!r} over {score.n!r} items; two numbers are"
            " expected"
        )
    value, n, items = float(score.value), int(score.n), tuple(score.items)
    if not math.isfinite(value):
        raise EvaluatorError(f"evaluator `{name}` scored {value}, which is not a finite number")
    if n < 1 or n != score.n:
        raise EvaluatorError(
            f"evaluator `{name}` scored n = {score.n} items, and at least one is expected"
        )
    if items and len(items) != n:
        raise EvaluatorError(f"evaluator `{name}` gave n = {n} and {len(items)} items")
    if not isinstance(score.unit, str) or not score.unit.isprintable():
        raise EvaluatorError(
            f"evaluator `{name}` gave the unit {score.unit!r}, and a text of one line is expected"
        )
    plain = tuple(map(_plain_item, items))
    for item in plain:
        for what, figure in (("scored", item.score), ("weighted", item.weight)):
            if not math.isfinite(figure):
                raise EvaluatorError(
                    f"evaluator `{name}` {what} item `{item.id}` {figure}, which is not a finite"
                    " number"
                )
        if item.parts is not None and not all(map(math.isfinite, item.parts.values())):
            raise EvaluatorError(
                f"evaluator `{name}` gave item `{item.id}` parts that are no finite numbers"
            )
    if len({(item.group, item.id) for item in plain}) < len(plain):
        raise EvaluatorError(f"evaluator `{name}` gave two items of the same group and id")
    details = {str(key): float(figure) for key, figure in score.details.items()}
    for key, figure in details.items():
        if not math.isfinite(figure):
            raise EvaluatorError(
                f"evaluator `{name}` gave {figure} for the detail `{key}`, which is not a finite"
                " number"
            )
    for file, text in score.files.items():
        if (
            not isinstance(file, str)
            or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", file)
            or not isinstance(text, str)
        ):
            raise EvaluatorError(
                f"evaluator `{name}` gave a file {file!r}; a plain file name and a text are"
                " expected"
            )
    return Score(value, score.unit, n, plain, details, dict(score.files))


def _plain_item(item: Item) -> Item:
    parts = {str(key): float(figure) for key, figure in (item.parts or {}).items()}
    return Item(str(item.id), str(item.group), float(item.score), float(item.weight), parts or None)
