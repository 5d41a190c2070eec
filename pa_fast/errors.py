"""Every error that pa_fast raises on purpose.

    PaFastError                exit code 1
    ├── UsageError             an argument is wrong in itself (exit code 2)
    ├── CheckpointError        a checkpoint folder or file cannot be read as one
    ├── PairError              two checkpoints do not describe the same model
    ├── DataError              unusable weights: non-finite, unequal integers, a file that changed
    ├── OutputError            the output cannot be written: not empty, no space, read-only
    ├── WeightsError           live weights: cannot be bound, moved, or are not what they should be
    ├── EngineError            an engine cannot verify that its model is the requested one
    ├── EvaluatorError         an evaluator or its data file is wrong
    ├── RunError               a run folder belongs to another sweep, or is in use
    ├── StatisticsError        items do not make up their score: no interval can be given
    └── MissingExtra           an optional package is not installed

A message names the tensor or file, what was found and what was expected; `hint` is the next step.
"""

from __future__ import annotations

from pa_fast.foreign import one_line, printable, shortened


class PaFastError(Exception):
    """Root of the tree. `message` is one sentence without a full stop, `hint` what to do next.

    Both are printable and of bounded length, whatever names and values of others they quote.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        message = (
            printable(shortened(message))
            if message.strip()
            else f"{type(self).__name__} without a message"
        )
        hint = None if hint is None else printable(shortened(hint))
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message = message
        self.hint = hint


class UsageError(PaFastError):
    """An argument is wrong in itself, whatever the files hold."""

    exit_code = 2


class CheckpointError(PaFastError):
    """A checkpoint folder or file cannot be read: missing, truncated, inconsistent, quantised."""


class PairError(PaFastError):
    """Two checkpoints do not describe the same model."""


class DataError(PaFastError):
    """The weights themselves are unusable, or changed while they were read."""


class OutputError(PaFastError):
    """The output folder or file cannot be written."""


class WeightsError(PaFastError):
    """Live weights cannot be bound, have moved, or are not what they should be."""


class EngineError(PaFastError):
    """An engine cannot verify that its model is the requested one."""


class EvaluatorError(PaFastError):
    """An evaluator, its options or its data file are wrong."""


class RunError(PaFastError):
    """A run folder belongs to another sweep, or is in use."""


class StatisticsError(PaFastError):
    """Items do not make up the score that they belong to: no interval can be given."""


class MissingExtra(PaFastError):
    """An optional package is not installed; the hint is the install command."""


def parted(text: str) -> tuple[str, str | None]:
    """Return message and hint of the text that a PaFastError prints; any other text and None."""
    message, mark, hint = text.partition("\n\nhint: ")
    return message, hint if mark else None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or the type of the error if there is
    none."""
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__), 500)
