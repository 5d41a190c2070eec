"""The loop of a sweep: switch, prove, evaluate, prove again, record."""

from __future__ import annotations

import math
import os
import pathlib
import socket
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pa_fast.base import Engine, Evaluator, Item, Lambda, Score, Weights
from pa_fast.errors import EvaluatorError, PaFastError, RunError, UsageError, WeightsError
from pa_fast.sweep import manifest, results, schedule
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.journal import Journal
from pa_fast.sweep.progress import Progress, Silent
from pa_fast.sweep.results import SweepResult

_HOST = socket.gethostname()


@dataclass(frozen=True)
class _Proof:
    """What the weights were when they were proven to be those of λ."""

    checksum: int
    effective_lambda: float | None
    switch_s: float


@dataclass(frozen=True)
class _Fault:
    """Why a point failed, as text: an exception would keep its frames alive, and with them the tensors they hold."""

    message: str
    traceback: str | None = None


def run(
    engine: Engine,
    lambdas: str | Iterable[float | str | Lambda],
    evaluators: Sequence[Evaluator],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    figure: bool = True,
) -> SweepResult:
    """`pa_fast.sweep`; see there."""
    points = schedule.lambdas(lambdas)
    evaluators = _distinct(evaluators)
    if not isinstance(engine, Engine):
        raise UsageError(f"a {type(engine).__name__} is not an engine", "pass what pa_fast.load returns, or see pa_fast/base.py")
    progress = Silent() if progress is None else progress
    folder = pathlib.Path(out)
    with Journal(folder, overwrite=overwrite) as journal:
        manifest.reconcile(folder, engine, points, evaluators, journal.evaluators())
        queues = [[e for e in evaluators if journal.finished(lam.key, e.name) is None] for lam in points]
        total = len(points) * len(evaluators)
        progress.begin(total, total - sum(map(len, queues)))
        try:
            for lam, queue in zip(points, queues):
                _visit(engine, lam, queue, journal, progress)
        finally:
            # Also on an interrupt: what is finished so far is in the files
            progress.end()
            result = results.load(folder)
            results.write(result)
        if figure:
            from pa_fast.sweep import figure as drawing

            drawing.write(result)
    asked = {(lam.key, evaluator.name) for lam in points for evaluator in evaluators}
    return replace(result, failures=tuple(f for f in result.failures if (f.lam.key, f.evaluator) in asked))


def _visit(engine: Engine, lam: Lambda, queue: list[Evaluator], journal: Journal, progress: Progress) -> None:
    """Bring `engine` to λ and run the evaluators in `queue` there; after one that writes to the weights, set them again."""
    proof: _Proof | None = None
    intact = not queue
    while queue or not intact:
        try:
            proof = _switch(engine, lam, proof)
        except Exception as error:
            # No proof, no evaluation
            for evaluator in queue:
                progress.recorded(journal.record(_entry(lam, evaluator, _fault(error))))
            return
        _compare(proof, lam, journal)
        intact = True
        progress.switched(lam, proof.switch_s)
        while queue and intact:
            evaluator = queue.pop(0)
            progress.evaluating(lam, evaluator.name)
            entry, items, intact = _evaluate(engine, lam, evaluator, proof)
            progress.recorded(journal.record(entry, items))


def _switch(engine: Engine, lam: Lambda, before: _Proof | None) -> _Proof:
    """Set λ and prove it: against a fresh merge on the first visit, against the first visit's sum afterwards."""
    weights = engine.weights
    start = time.perf_counter()
    weights.set_lambda(lam)
    engine.on_weights_changed()
    switch_s = time.perf_counter() - start
    if before is None and not weights.verify():
        raise WeightsError(
            f"the live weights at λ = {lam.key} differ from a fresh merge", "reload the pair; if it happens again, report it"
        )
    checksum = weights.checksum()
    if before is None:
        effective = float(weights.effective_lambda())
        return _Proof(checksum, effective if math.isfinite(effective) else None, switch_s)
    if checksum != before.checksum:
        raise WeightsError(f"setting λ = {lam.key} again did not restore the live weights", "reload the pair and run again")
    return before


def _compare(proof: _Proof, lam: Lambda, journal: Journal) -> None:
    recorded = journal.checksum(lam.key)
    if recorded is not None and recorded != proof.checksum:
        raise RunError(
            f"{journal.folder} has other weights at λ = {lam.key}: recorded checksum {recorded:016x}, now {proof.checksum:016x}",
            "the checkpoints have changed since: choose another --out, or start afresh with --overwrite",
        )


def _evaluate(engine: Engine, lam: Lambda, evaluator: Evaluator, proof: _Proof) -> tuple[Entry, Sequence[Item], bool]:
    """Run one evaluator; also tells whether the weights are as they were. The sum of `proof` is the sum before: nothing
    but evaluators runs between two of them, and each is followed by a sum of its own."""
    score: Score | None = None
    fault: _Fault | None = None
    start = time.perf_counter()
    try:
        score = _checked(evaluator.name, evaluator(engine))
    except (Exception, SystemExit) as error:
        fault = _fault(error)
    eval_s = time.perf_counter() - start
    try:
        intact = engine.weights.checksum() == proof.checksum
        if intact:
            engine.on_weights_changed()  # the weights are what they were: is the model still made of them?
        else:
            fault = _written(evaluator.name, lam, engine.weights, fault)
    except Exception as error:
        left = _fault(error)
        intact, fault = False, _Fault(f"evaluator `{evaluator.name}` changed the model: {left.message}", left.traceback)
    items = score.items if score is not None and fault is None else ()
    return _entry(lam, evaluator, fault or score, proof, eval_s), items, intact


def _entry(
    lam: Lambda, evaluator: Evaluator, outcome: Score | _Fault | None, proof: _Proof | None = None, eval_s: float | None = None
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
        error=None if fault is None else fault.message,
        traceback=None if fault is None else fault.traceback,
        checksum=None if proof is None else proof.checksum,
        effective_lambda=None if proof is None else proof.effective_lambda,
        switch_s=None if proof is None else proof.switch_s,
        eval_s=eval_s,
        host=_HOST,
    )


def _fault(error: BaseException) -> _Fault:
    if isinstance(error, PaFastError):
        return _Fault(error.message)
    try:
        return _Fault(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
    except Exception:  # an exception of the user's own may fail to print itself
        return _Fault(f"{type(error).__name__}, whose message cannot be printed")


def _written(name: str, lam: Lambda, weights: Weights, fault: _Fault | None) -> _Fault:
    now = weights.lam
    if now is None or float(now) != float(lam):
        message = f"evaluator `{name}` left the live weights at λ = {now}, and found them at {lam.key}"
    else:
        changed = weights.changed()
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        message = f"evaluator `{name}` wrote to the live weights: {shown or 'their checksum changed'}"
    return _Fault(message) if fault is None else _Fault(f"{message}; it also failed: {fault.message}", fault.traceback)


def _checked(name: str, score: object) -> Score:
    """`score` with plain numbers, if it is one that can be recorded and compared."""
    if not isinstance(score, Score):
        raise EvaluatorError(f"evaluator `{name}` returned a {type(score).__name__} instead of a pa_fast.Score")
    value, n, items = float(score.value), int(score.n), tuple(score.items)
    if not math.isfinite(value):
        raise EvaluatorError(f"evaluator `{name}` scored {value}, which is not a finite number")
    if n < 1 or n != score.n:
        raise EvaluatorError(f"evaluator `{name}` scored n = {score.n} items, and at least one is expected")
    if items and len(items) != n:
        raise EvaluatorError(f"evaluator `{name}` gave n = {n} and {len(items)} items")
    if not isinstance(score.unit, str) or not score.unit.isprintable():
        raise EvaluatorError(f"evaluator `{name}` gave the unit {score.unit!r}, and a text of one line is expected")
    plain = tuple(Item(str(item.id), str(item.group), float(item.score)) for item in items)
    for item in plain:
        if not math.isfinite(item.score):
            raise EvaluatorError(f"evaluator `{name}` scored item `{item.id}` {item.score}, which is not a finite number")
    if len({(item.group, item.id) for item in plain}) < len(plain):
        raise EvaluatorError(f"evaluator `{name}` gave two items of the same group and id")
    return Score(value, score.unit, n, plain)


def _distinct(evaluators: Sequence[Evaluator]) -> list[Evaluator]:
    if callable(evaluators):
        raise UsageError("one evaluator instead of a list of them", "write [evaluator]")
    evaluators = list(evaluators)
    if not evaluators:
        raise UsageError("a sweep needs at least one evaluator", "pass a list of them; on the command line --eval, once or more")
    names = []
    for evaluator in evaluators:
        if not isinstance(evaluator, Evaluator):
            raise UsageError(
                f"a {type(evaluator).__name__} is not an evaluator", "give it a name, higher_is_better and __call__(engine)"
            )
        if not (isinstance(evaluator.name, str) and evaluator.name.strip() and evaluator.name.isprintable()):
            raise UsageError(f"{evaluator.name!r} is not a name for an evaluator", "a text of one line is expected")
        names.append(evaluator.name)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UsageError(f"two evaluators are called `{twice[0]}`", "give each a name of its own; in an EVAL string `,name=…`")
    return evaluators
