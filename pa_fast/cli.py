"""The command line: parse, build, call the library, print. Data goes to stdout, progress and messages to stderr."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pa_fast.errors import DataError, PaFastError, UsageError, parted
from pa_fast.units import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pa_fast.run import SweepSpec
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import Failure, SweepResult
    from pa_fast.throughput import Throughput

app = typer.Typer(
    name="pa-fast",
    help="Dense, exact λ sweeps along W(λ) = B + λ (I − B) between a base checkpoint and its instruct sibling.",
    epilog="BASE and INSTRUCT are local folders or hub ids (org/name@revision). `pa-fast VERB --help` explains each verb; "
    "--debug shows the traceback of an error.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base checkpoint, λ = 0.")]
Instruct = Annotated[str, typer.Argument(metavar="INSTRUCT", help="The instruct checkpoint, λ = 1.")]
Dtype = Annotated[str, typer.Option(metavar="D", help="bfloat16, float16, float32, or auto: as each tensor is in INSTRUCT.")]
Rounding = Annotated[
    str, typer.Option(metavar="R", help="nearest, or stochastic: λ is followed on average where nearest bends it.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of stochastic rounding; 0 by default.")]
Rule = Annotated[str | None, typer.Option(metavar="FILE", help="YAML rows by which λ spreads over the tensors: docs/rules.md.")]
ExtraRows = Annotated[
    str, typer.Option(metavar="P", help="Vocabulary rows that one side alone has: instruct keeps them as they are, or refuse.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity in the weights pass.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

SWEEP_HELP = """Evaluate every λ on one live copy of the weights, and draw the trajectory.

A sweep resumes by itself: run it again with the same --out, and finished points are not run again.

\b
LAMBDAS   0:1:0.1          both ends included
          0,0.25,1/3,1.5   decimals and fractions
EVAL      perplexity:notes.txt,window=512
          icl:tasks.jsonl,shots=5,mode=cloze
          generate:requests.jsonl,chat=true,max_new_tokens=256
          alpaca:alpaca_eval.json,max_new_tokens=2048
          lm-eval:piqa,arc_easy,shots=5
          python:my_package.my_module:my_function
          suite.yaml       a list of these, or of mappings such as
                           {eval: icl, file: tasks.jsonl, shots: 5}

\b
Options of EVAL follow the target: name=… is its column in the results.
          perplexity  window= stride= split=blank
          icl         shots= sep= pool=FILE mode=cloze|letter|generate
                      norm= (cloze)  until= max_new_tokens= (generate)
          generate    chat=true max_new_tokens= regex= check=module:function
          alpaca      chat=false max_new_tokens= generator=
          lm-eval     shots= chat=true metric= include_path=FOLDER
Rows of data are JSON, one a line or a list in a .json file; id and group are optional.
          icl         question (or a verbatim prompt), choices, answer
          generate    prompt or messages; answer or regex scores the output
          alpaca      instruction
A comma in a value is written \\, and --limit does not reach python:.
"""


def _verb(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command; an interrupt inside it ends with exit code 130 instead of typer's 1."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def interruptible(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                _say("interrupted")
                raise typer.Exit(130) from None

        app.command(**options)(interruptible)
        return function

    return register


def _version(wanted: bool) -> None:
    if wanted:
        import pa_fast

        print(f"pa-fast {pa_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@_verb(help=SWEEP_HELP)
def sweep(
    base: Base,
    lambdas: Annotated[str, typer.Option(metavar="LAMBDAS", help="Which λ: a range, a list, or both.")],
    evals: Annotated[list[str], typer.Option("--eval", metavar="EVAL", help="What to evaluate; may be given again.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The run folder: journal, results and figure.")],
    instruct: Annotated[
        str | None, typer.Argument(metavar="INSTRUCT", help="The instruct checkpoint, λ = 1; not needed beside --delta.")
    ] = None,
    store: Annotated[
        str, typer.Option(metavar="S", help="How the delta is held: auto, dense, packed, sparse, lowrank or attached.")
    ] = "auto",
    residency: Annotated[
        str, typer.Option(metavar="R", help="Where a GPU keeps it: auto, device, or host (pinned memory).")
    ] = "auto",
    delta: Annotated[str | None, typer.Option(metavar="FILE", help="A file of `pa-fast encode`, instead of INSTRUCT.")] = None,
    confirm: Annotated[
        int, typer.Option(metavar="N", min=0, help="After a sweep with a lossy delta: the best N points once more, exactly.")
    ] = 0,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Dtype = "auto",
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Tokenizer for all λ; INSTRUCT's by default.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Requests per forward pass, at every λ.")] = 8,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most N items per evaluator.")] = None,
    rounding: Rounding = "nearest",
    rule: Rule = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of shots, of --limit and of stochastic rounding.")] = 0,
    engine: Annotated[
        str, typer.Option(metavar="E", help="transformers, or tensor-parallel: one model on all ranks of torchrun.")
    ] = "transformers",
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes on Ray, one GPU or share of cores each.")] = 1,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Run every Nth λ from I on; auto: as torchrun or SLURM says.")
    ] = None,
    extra_rows: ExtraRows = "instruct",
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh in a folder that holds a sweep.")] = False,
) -> None:
    from pa_fast.rules import LambdaRule
    from pa_fast.run import SweepSpec, check_confirm
    from pa_fast.run import confirm as run_again
    from pa_fast.sweep.progress import TerminalProgress

    job = SweepSpec(
        base, instruct, lambdas, tuple(evals), out, device, dtype, store, tokenizer, batch_size, limit, seed,
        allow_nonfinite, overwrite, engine, delta, rounding, None if rule is None else LambdaRule.load(rule), extra_rows,
        residency,
    )  # fmt: skip
    if confirm and shard is not None:
        raise UsageError(
            "--confirm and --shard together", "confirm when all shards are done: run the same command without --shard"
        )
    if confirm:
        check_confirm(job)
    # a delta takes the place of INSTRUCT, which then serves to confirm alone
    swept = job if delta is None else dataclasses.replace(job, instruct=None, tokenizer=tokenizer or instruct)
    try:
        result = _launch(swept, workers, shard, TerminalProgress())
    except KeyboardInterrupt:
        again = [part for part in sys.argv[1:] if part != "--overwrite"]
        _say(f"\ninterrupted; finished points are kept. Go on with:\n  {shlex.join(['pa-fast', *again])}")
        raise typer.Exit(130) from None
    if result is None:
        return  # a rank whose first one tells
    _print(result.table())
    _say_where(result)
    if confirm:
        confirmed = run_again(job, result, confirm, TerminalProgress())
        print("\nconfirmed with an exact store:")
        _print(confirmed.table())
        _say_where(confirmed)
        result = dataclasses.replace(result, failures=result.failures + confirmed.failures)
    if result.failures:
        _say_failures(result.failures)
        raise PaFastError(
            f"{len(result.failures)} of {format_count(len(result.failures) + len(result.rows), 'point')} failed",
            "run the same command again to try the failed points once more",
        )


def _launch(job: SweepSpec, workers: int, shard: str | None, progress: Progress) -> SweepResult | None:
    """Run `job` in as many processes as asked for; None on ranks that leave the telling to the first."""
    if shard is not None and workers > 1:
        raise UsageError("--workers and --shard together", "--workers starts processes here; --shard is one of several")
    if job.engine == "tensor-parallel":
        if shard is not None or workers > 1:
            raise UsageError(
                "--engine tensor-parallel with --workers or --shard", "its ranks are one worker: start it with torchrun"
            )
        from pa_fast.launch import lockstep

        return lockstep.run(job, progress)
    if workers > 1:
        from pa_fast.launch import ray

        return ray.run(job, workers, progress)
    from pa_fast.launch import environment
    from pa_fast.run import run
    from pa_fast.sweep.shard import Shard

    if shard is None:
        return run(job, progress)
    part = Shard(*environment.shard()) if shard == "auto" else Shard.parse(shard)
    return run(job, progress, (part.rank, part.world))


@_verb()
def merge(
    base: Base,
    instruct: Instruct,
    lam: Annotated[str, typer.Option("--lambda", metavar="L", help="Any finite λ: 0.6, 1/3, -0.2.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to write; must be new or empty.")],
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file, such as 5GB; cut as BASE's files are by default.")
    ] = None,
    dtype: Dtype = "auto",
    rounding: Rounding = "nearest",
    seed: Seed = None,
    rule: Rule = None,
    extra_rows: ExtraRows = "instruct",
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR.")] = False,
    as_json: Json = False,
) -> None:
    """Write the merge at one λ as a checkpoint folder that transformers loads.

    A merge that was killed or interrupted goes on from its complete weight files when the same command runs again.
    """
    from pa_fast.checkpoint.merge import merge as run

    try:
        with _byte_bar("merging") as bar:
            report = run(
                base, instruct, lam, out,
                dtype=dtype, rounding=rounding, seed=seed, rule=rule, max_shard_size=max_shard_size,
                extra_rows=extra_rows, allow_nonfinite=allow_nonfinite, overwrite=overwrite, progress=bar,
            )  # fmt: skip
    except KeyboardInterrupt:
        _say(f"\ninterrupted; complete weight files are kept. Go on with:\n  {shlex.join(['pa-fast', *sys.argv[1:]])}")
        raise typer.Exit(130) from None
    if as_json:
        _print_json(report)
    else:
        rate = format_rate(report.bytes, report.seconds)
        size = f"{format_bytes(report.bytes)} in {format_count(report.shards, 'file')}"
        print(f"{report.out}: λ = {report.lam}, {report.tensors} tensors, {size}, {format_seconds(report.seconds)} ({rate})")
        if report.resumed:
            _say(f"note: {report.resumed} of {format_count(report.shards, 'file')} were complete from an unfinished run")
        for note in report.notes:
            _say(f"note: {note}")


@_verb()
def encode(
    base: Base,
    instruct: Instruct,
    format: Annotated[str, typer.Option(metavar="F", help="packed or sparse, which can lose nothing; lowrank or dense.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="The delta file to write.")],
    range_: Annotated[
        str | None, typer.Option("--range", metavar="LO:HI", help="packed: the λ that it is for; 0:1 by default.")
    ] = None,
    select: Annotated[str | None, typer.Option(metavar="S", help="sparse: exact, topk, ties or dare.")] = None,
    density: Annotated[float | None, typer.Option(metavar="D", help="topk, ties, dare: share of the weights, in (0, 1].")] = None,
    scope: Annotated[str | None, typer.Option(metavar="S", help="topk: that share of each tensor, or global.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="lowrank: rank of every matrix; 64 if nothing is said.")] = None,
    energy: Annotated[float | None, typer.Option(metavar="E", help="lowrank: share of ‖I − B‖² that each matrix keeps.")] = None,
    budget: Annotated[int | None, typer.Option(metavar="BYTES", help="lowrank: bytes of the whole delta.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of dare and of the decomposition; 0 by default.")] = None,
    dtype: Dtype = "auto",
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Also compare with the exact merge on this text.")] = None,
    as_json: Json = False,
) -> None:
    """Write the delta between two checkpoints to a file; with it `sweep --delta` needs BASE alone."""
    from pa_fast.encoding import encode as run

    report = run(
        base, instruct, out, format,
        select=select, density=density, scope=scope, rank=rank, energy=energy, budget=budget, seed=seed, range=_range(range_),
        dtype=dtype, allow_nonfinite=allow_nonfinite, overwrite=overwrite, text=text,
    )  # fmt: skip
    if as_json:
        print(report.to_json())
        return
    kept = "loses nothing" if report.lossless else f"relative error {report.relative_error:.3g}, ‖D′‖² / ‖D‖² {report.energy:.3g}"
    size = f"{format_bytes(report.bytes)}, {report.bytes_per_parameter:.3g} bytes per parameter"
    print(f"{out}: {report.options}: {size}; {kept}")
    for point in report.text.points if report.text else ():
        print(f"λ = {point.lam}: KL to the exact merge {point.kl:.3g} nats per token, {point.agreement:.1%} of tokens agree")


def _range(text: str | None) -> tuple[float, float] | None:
    from pa_fast.base import Lambda

    if text is None:
        return None
    ends = text.split(":")
    if len(ends) != 2:
        raise UsageError(f"--range {text}", "write the least and the largest λ, such as -0.2:1.5")
    return float(Lambda(ends[0])), float(Lambda(ends[1]))


@_verb()
def lora(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="A low-rank file of `pa-fast encode`.")],
    base: Base,
    out: Annotated[str, typer.Option(metavar="DIR", help="The LoRA folder to write; must be new or empty.")],
    lam: Annotated[str, typer.Option("--lambda", metavar="L", help="lora_alpha is λ times the rank.")] = "1",
    partial: Annotated[bool, typer.Option("--partial", help="Leave out what a LoRA cannot hold, such as norms.")] = False,
) -> None:
    """Write a low-rank delta as a LoRA folder that peft loads."""
    from pa_fast.encoding import export_lora

    made = export_lora(delta, base, out, lam, partial=partial)
    print(f"{out}: {format_count(len(made.ranks), 'layer')}, rank {max(made.ranks.values())}, λ = {lam}")
    if made.left_out:
        _say(f"note: left out {format_count(len(made.left_out), 'tensor')}, such as `{made.left_out[0]}`")


@_verb()
def verify(
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The checkpoint in question.")],
    base: Base,
    instruct: Instruct,
    lam: Annotated[
        str | None, typer.Option("--lambda", metavar="L", help="λ of the merge; MERGED's pa_fast.json by default.")
    ] = None,
    rounding: Annotated[str | None, typer.Option(metavar="R", help="Rounding of the merge; by default likewise.")] = None,
    seed: Seed = None,
    rule: Annotated[str | None, typer.Option(metavar="FILE", help="λ rule of the merge; by default likewise.")] = None,
    as_json: Json = False,
) -> None:
    """Is this checkpoint that merge, bit by bit?"""
    from pa_fast.checkpoint.verify import verify as run

    with _byte_bar("verifying") as bar:
        report = run(merged, base, instruct, lam, rounding=rounding, seed=seed, rule=rule, progress=bar)
    if as_json:
        _print_json(report)
    elif report.ok:
        print(f"{report.merged}: every bit of {report.tensors} tensors is the merge at λ = {report.lam}")
        for note in report.notes:
            _say(f"note: {note}")
    if not report.ok:
        wrong = report.differences
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        counted = f" ({wrong[0].differing:,} of {wrong[0].count:,} weights differ)" if wrong[0].differing else ""
        raise DataError(
            f"{report.merged} is not the merge at λ = {report.lam}: `{wrong[0].name}` {wrong[0].reason}{counted}{more}",
            "compare λ, rule, rounding, dtype and the source folders with those in its pa_fast.json; --json lists every tensor",
        )


@_verb()
def inspect(
    base: Base,
    instruct: Instruct,
    sample: Annotated[bool, typer.Option("--sample", help="Measure 65,536 weights of every tensor.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Measure all weights.")] = False,
    fidelity: Annotated[
        str | None, typer.Option(metavar="LAMBDAS", help="Which λ each of these really is, once rounded; 0:1:0.1.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the delta by layer and module to FILE.png and FILE.svg.")
    ] = None,
    dtype: Dtype = "auto",
    rounding: Rounding = "nearest",
    seed: Seed = None,
    rule: Rule = None,
    extra_rows: ExtraRows = "instruct",
    as_json: Json = False,
) -> None:
    """Do these two checkpoints pair? Answered from headers alone, in a second; how far apart they are from the weights.

    Without --full, --fidelity and --figure measure a sample.
    """
    from pa_fast.checkpoint.inspect import inspect as run
    from pa_fast.sweep.schedule import lambdas

    grid = lambdas(fidelity) if fidelity is not None else ()
    drawing = None if figure is None else Path(figure.removesuffix(".png").removesuffix(".svg"))
    if drawing is not None:
        from pa_fast.sweep.figure import check_place

        check_place(drawing)
    with _byte_bar("measuring", shown=sample or full or fidelity is not None or figure is not None) as bar:
        report = run(
            base, instruct,
            sample=sample or (figure is not None and not full), full=full, fidelity=grid,
            dtype=dtype, rounding=rounding, seed=seed, rule=rule, extra_rows=extra_rows, progress=bar,
        )  # fmt: skip
    if as_json:
        _print_json(report)
    else:
        from pa_fast.quality.pair_table import tables

        for table in tables(report):
            _print(table)
    if drawing is not None:
        from pa_fast.quality import delta_map

        delta_map.write(report, drawing)


@_verb()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Run folders of sweeps.")],
) -> None:
    """Print the table of one or more runs, and write their results and figures again from the journals."""
    from pa_fast.sweep.report import report as run
    from pa_fast.sweep.results import table

    results = run(runs)
    _print(table(results))
    for result in results:
        _say_where(result)


@_verb()
def bench(
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, or auto.")] = "auto",
    shape: Annotated[
        str, typer.Option(metavar="S", help="1b, 8b, 70b, or a checkpoint folder; auto: 8b on a GPU, 1b on a CPU.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Runs of everything; the median counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Time switches of synthetic weights on this machine, beside what it can do at all, and count the bytes of each store."""
    from pa_fast.throughput import measure

    found = measure(device, shape, rounds, _say)
    if as_json:
        print(found.to_json())
    else:
        _print(_throughput_table(found))


def _throughput_table(found: Throughput) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{found.machine}, torch {found.torch}: {found.weights / 1e9:.2f} G bf16 weights in {found.tensors} tensors"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("", "‖I − B‖ / ‖B‖", "bytes per weight", "ms", "GB/s", "× dense", "encoded in"):
        table.add_column(column, justify="left" if not column else "right")
    dense = {row.relative_delta: row.seconds for row in found.rows if row.what == "dense"}
    for row in found.rows:
        if row.what == "dense" or row.relative_delta is None:
            table.add_section()
        table.add_row(
            row.what,
            "" if row.relative_delta is None else f"{row.relative_delta:g}",
            "" if row.bytes_per_weight is None else f"{row.bytes_per_weight:.3f}",
            f"{row.seconds * 1000:.4g}",
            f"{row.gbps:.4g}",
            "" if row.relative_delta is None else f"{row.seconds / dense[row.relative_delta]:.2f}",
            "" if row.encode_s is None else format_seconds(row.encode_s),
        )
    return table


def main() -> NoReturn:
    """Entry point of `pa-fast`: every failure is one message and an exit code, a traceback only with --debug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    gc.set_threshold(100_000)  # imports make a million objects that stay: looking through them again takes a fifth of their time
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot write λ gets a question mark, not a failure
    try:
        app(args=arguments, prog_name="pa-fast")
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, PaFastError):
            _say(f"error: {error}")
            sys.exit(error.exit_code)
        if isinstance(error, OSError):
            where = error.filename or "output"
            _say(f"error: {where}: {error.strerror or error}\n\nhint: check the disk and permissions, then run again")
            sys.exit(1)
        _say(f"error: unexpected {type(error).__name__}: {error}\n\nhint: a bug in pa_fast; run again with --debug to see where")
        sys.exit(1)
    sys.exit(0)


def _say_failures(failures: Iterable[Failure]) -> None:
    """One line a point; a hint below the first point that it is for."""
    known: set[str | None] = {None}
    for failure in failures:
        message, hint = parted(failure.error)
        _say(f"failed: {failure.evaluator} at λ = {failure.lam.key}: {' '.join(message.split())}")
        if hint not in known:
            _say(f"  hint: {hint}")
            known.add(hint)


def _say_where(result: SweepResult) -> None:
    drawn = " and figure" if (result.out / "trajectory.png").exists() else ""
    _say(f"results{drawn}: {result.out}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width: wrapping there would break tables for the programs that read them.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=10_000)


def _print(drawable: Any) -> None:
    _console().print(drawable)


def _print_json(report: Any, **more: Any) -> None:
    print(json.dumps({**dataclasses.asdict(report), **more}, indent=1, ensure_ascii=False, default=str))


@contextmanager
def _byte_bar(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes and rate on stderr, if stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
