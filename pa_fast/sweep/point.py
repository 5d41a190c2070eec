"""One λ of a sweep: switch, verify, evaluate, compare the checksum."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pa_fast.base import CompleteEngine, CompleteEvaluator, CompleteWeights, Item, Lambda, Score
from pa_fast.errors import EvaluatorError, PaFastError, RunError, WeightsError
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.process import Restored
from pa_fast.sweep.progress import Progress, listening

_HOST = socket.gethostname()

MERGED_EVERY = 16
"""Of so many λ of a process the first is merged again by other code than the switch's."""


@dataclass(frozen=True)
class Record:
    """The result of one evaluator at one λ: its line of the journal, and the contents of its
    files."""

    entry: JournalEntry
    items: Sequence[Item] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Verified:
    """Checksum and effective λ of the weights when they were verified, and the time of the
    switch."""

    checksum: int
    effective_lambda: float | None
    intended_lambda: float | None
    switch_s: float


@dataclass(frozen=True)
class _Fault:
    """The error of a point, as text: an exception would keep its frames alive, and with them their
    tensors."""

    message: str
    traceback: str | None = None


def check_reach(engine: CompleteEngine, points: Iterable[Lambda]) -> None:
    """Check, before the first point of a schedule, that the weights can be set to each of its λ.

    Raises:
        UsageError: as the weights' own `check_lambda`.
    """
    for lam in points:
        engine.weights.check_lambda(lam)


def visit(
    engine: CompleteEngine,
    lam: Lambda,
    evaluators: Sequence[CompleteEvaluator],
    recorded: int | None = None,
    progress: Progress | object | None = None,
    *,
    merge_again: bool = True,
) -> Iterator[Record]:
    """Set `engine` to λ and run `evaluators` there, yielding the record of each before the next one
    starts.

    After one that writes to the weights, λ is set again; changes to the process are undone, see
    `Restored`.

    Args:
        recorded: checksum of the weights on which other points of this λ were finished; None
            without such points.
        merge_again: compare the weights with an independent merge; else memory is compared with
            what the switch computed. A run asks it of its first λ, and of every MERGED_EVERY-th.

    Raises:
        RunError: the switch gives weights with another checksum than `recorded`, or an evaluator
            changed something of the process that cannot be put back.
    """
    events = listening(progress)
    queue = list(evaluators)
    verified: _Verified | None = None
    intact = not queue
    while queue or not intact:
        try:
            verified = _switch(engine, lam, verified, merge_again)
        except Exception as error:
            # weights that were not verified are not evaluated
            for evaluator in queue:
                yield Record(_entry(lam, evaluator, _fault(error)))
            return
        if recorded is not None:
            _check_same(lam, recorded, verified.checksum)
        intact = True
        events.switched(lam, verified.switch_s)
        while queue and intact:
            evaluator = queue.pop(0)
            events.evaluating(lam, evaluator.name)
            with _with_progress(engine, events):
                record, intact = _evaluate(engine, lam, evaluator, verified)
            yield record


@contextlib.contextmanager
def _with_progress(engine: CompleteEngine, progress: Progress) -> Iterator[None]:
    """Let the engine report finished requests to `progress` within the block, if it has
    `within`."""
    if progress.within is None:
        yield
        return
    before, engine.on_progress = engine.on_progress, progress.within
    try:
        yield
    finally:
        engine.on_progress = before


def _check_same(lam: Lambda, recorded: int, checksum: int) -> None:
    if recorded != checksum:
        raise RunError(
            f"the run has other weights at λ = {lam.key}: recorded checksum {recorded:016x}, now"
            f" {checksum:016x}",
            "the checkpoints have changed since: choose another --out, or start afresh with"
            " --overwrite",
        )


def _switch(
    engine: CompleteEngine, lam: Lambda, before: _Verified | None, merge_again: bool
) -> _Verified:
    """Set λ and verify the weights: at the first visit by `read_back`, by the checksum of that
    visit afterwards."""
    weights = engine.weights
    start = time.perf_counter()
    weights.set_lambda(lam)
    engine.on_weights_changed()
    switch_s = time.perf_counter() - start
    if before is None:
        checksum = weights.read_back(merge_again)
        return _Verified(
            checksum, _finite(weights.effective_lambda()), _intended(weights), switch_s
        )
    if weights.checksum() != before.checksum:
        raise WeightsError(
            f"setting λ = {lam.key} again did not restore the live weights",
            "reload the pair and run again",
        )
    return before


def _intended(weights: CompleteWeights) -> float | None:
    """Return what effective λ would be without rounding where weights follow a rule; None
    otherwise, where it is λ."""
    return None if weights.rule is None else _finite(weights.intended_lambda())


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _evaluate(
    engine: CompleteEngine, lam: Lambda, evaluator: CompleteEvaluator, verified: _Verified
) -> tuple[Record, bool]:
    """Run one evaluator and restore the process; return its record, and whether the weights are
    unchanged.

    The checksum before is that of `verified`: nothing but evaluators runs in between, and each is
    followed by a checksum.
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
        intact = engine.weights.checksum() == verified.checksum
        if intact:
            # the weights are unchanged; check that the model still uses them
            engine.on_weights_changed()
        else:
            fault = _written(evaluator.name, lam, engine.weights, fault)
    except Exception as error:
        cause = _fault(error)
        intact, fault = (
            False,
            _Fault(
                f"evaluator `{evaluator.name}` changed the model: {cause.message}", cause.traceback
            ),
        )
    entry = replace(
        _entry(lam, evaluator, fault or score, verified, eval_s), restored=process.changed or None
    )
    if score is None or fault is not None:
        return Record(entry), intact
    return Record(entry, score.items, score.files), intact


def _entry(
    lam: Lambda,
    evaluator: CompleteEvaluator,
    outcome: Score | _Fault | None,
    verified: _Verified | None = None,
    eval_s: float | None = None,
) -> JournalEntry:
    score = outcome if isinstance(outcome, Score) else None
    fault = outcome if isinstance(outcome, _Fault) else None
    assert score is not None or fault is not None
    return JournalEntry(
        lam=lam.key,
        evaluator=evaluator.name,
        score=None if score is None else score.value,
        unit=None if score is None else score.unit,
        n=None if score is None else score.n,
        details=None if score is None or not score.details else dict(score.details),
        error=None if fault is None else fault.message,
        traceback=None if fault is None else fault.traceback,
        checksum=None if verified is None else verified.checksum,
        effective_lambda=None if verified is None else verified.effective_lambda,
        intended_lambda=None if verified is None else verified.intended_lambda,
        switch_s=None if verified is None else verified.switch_s,
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


def _written(name: str, lam: Lambda, weights: CompleteWeights, fault: _Fault | None) -> _Fault:
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
    """Return `score` with plain numbers.

    Raises:
        EvaluatorError: it cannot be recorded or compared.
    """
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
            or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", file)
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
