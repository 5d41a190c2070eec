"""The command line: parse arguments, call the library, print. Data go to stdout, progress and
messages to stderr."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import typer

from pa_fast.cli.deltas import encode, lora
from pa_fast.cli.merges import merge, verify
from pa_fast.cli.output import debugging, drop_output, open_standard_streams
from pa_fast.cli.pairs import inspect
from pa_fast.cli.runs import SWEEP_HELP, report, sweep
from pa_fast.cli.speed import bench
from pa_fast.errors import PaFastError
from pa_fast.foreign import shortened
from pa_fast.terminal import libraries_printable, say, tell

__all__ = ["app", "main"]

# click's, which newer versions of typer carry under a name of their own
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="pa-fast",
    help=(
        "Dense, exact λ sweeps along W(λ) = B + λ (I − B) between a base checkpoint and its"
        " instruct sibling."
    ),
    epilog=(
        "BASE and INSTRUCT are local folders or hub ids (org/name@revision). `pa-fast COMMAND"
        " --help` explains each command."
    ),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import pa_fast

        tell(f"pa-fast {pa_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the tracebacks of errors and of failed points; anywhere in the command.",
        ),
    ] = False,  # for --help: `main` takes it out, wherever it stands
) -> None:
    pass


def _command(function: Callable[..., None], **options: Any) -> None:
    """Register a command. An interrupt ends it with exit code 130 instead of typer's 1, and output
    that nobody reads with a message instead of none."""

    @functools.wraps(function)
    def interruptible(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()  # here, where a failure still has a message
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            drop_output()
            say(
                "error: standard output was closed before all of it was read\n\nhint: what was"
                " written to files is whole"
            )
            raise typer.Exit(1) from None
        except OSError:
            drop_output()
            raise

    app.command(**options)(interruptible)


_command(sweep, help=SWEEP_HELP)
for _function in (merge, encode, lora, verify, inspect, report, bench):
    _command(_function)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, which batch systems send before they kill, end the block as Ctrl-C does.

    A rank of torchrun keeps what it has: torchrun ends ranks by it, which may wait for others in
    code that no exception interrupts.
    """
    if "LOCAL_RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a child that was forked ends by it
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> NoReturn:
    """Run `pa-fast`: every failure is one message and an exit code; --debug adds the traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = debugging()
    gc.set_threshold(
        100_000
        # imports make a million objects that stay: looking through them again takes a fifth of
        # their time
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot write λ gets a question mark, not a failure
            stream.reconfigure(errors="replace")
    if debug:
        sys.excepthook = lambda *error: say("".join(traceback.format_exception(*error)))
    try:
        open_standard_streams()
        with libraries_printable(), _terminable():
            sys.exit(app(args=arguments, prog_name="pa-fast", standalone_mode=False))
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except _UsageError as error:
        # typer's own way prints arguments as they are, and a file's name may be one
        with io.StringIO() as text:
            error.show(file=text)
            say(text.getvalue().rstrip())
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, PaFastError):
            say(f"error: {error}")
            sys.exit(error.exit_code)
        if isinstance(error, OSError):
            where = error.filename or "output"
            say(
                f"error: {where}: {error.strerror or error}\n\nhint: check the disk and"
                " permissions, then run again"
            )
            sys.exit(1)
        shown = shortened(f"{type(error).__name__}: {error}")
        say(
            f"error: unexpected {shown}\n\nhint: a bug in pa_fast; run again with --debug to see"
            " where"
        )
        sys.exit(1)
    finally:
        # what libraries leave is not searched for garbage once more at exit: 0.4 s after torch
        gc.freeze()
