"""The commands `sweep`, which fills a run folder, and `report`, which prints run folders."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pa_fast.cli.options import (
    AllowNonfinite,
    Base,
    Dtype,
    ExtraRows,
    IgnoreConfig,
    Keep,
    Objective,
    OneSided,
    RoundingOption,
    RuleOption,
    StripPrefix,
)
from pa_fast.cli.output import say_where, show
from pa_fast.cli.sweep_output import SweepOutput, say_answer, sweep_output
from pa_fast.errors import PaFastError, UsageError
from pa_fast.foreign import one_line
from pa_fast.terminal import say, tell
from pa_fast.units import format_count

if TYPE_CHECKING:
    from pa_fast.run import SweepSpec
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


SWEEP_HELP = """Evaluate each λ on one live copy of the weights.

Results and a figure are written to --out. To resume a sweep, run the same command again: finished
points are kept.

\b
LAMBDAS   0:1:0.1          both ends included
          0,0.25,1/3,1.5   decimals and fractions
          auto             0, 0.2 … 1, then where the best λ lies: 12 at most
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
          all         average=macro|micro over groups, but python:
                      overflow=refuse|skip|truncate: items that are too long
          perplexity  window= stride= split=blank
          icl         shots= sep= pool=FILE mode=cloze|letter|generate
                      norm= (cloze)  until= max_new_tokens= (generate)
                      overflow=fewer-shots
          generate    chat=true max_new_tokens= regex= check=module:function
          alpaca      chat=false max_new_tokens= generator=
          lm-eval     shots= chat=true metric= include_path=FOLDER
                      log_samples=false
Rows of data are JSON, one a line or a list in a .json file; id and group are optional.
          icl         question (or a verbatim prompt), choices, answer
          generate    prompt or messages; answer or regex scores the output
          alpaca      instruction
Write a comma within a value as \\,. --limit does not apply to python: evaluators.
"""


def sweep(
    base: Base,
    lambdas: Annotated[
        str, typer.Option(metavar="LAMBDAS", help="Which λ: a range, a list, both, or auto.")
    ],
    evals: Annotated[
        list[str],
        typer.Option(
            "--eval", metavar="EVAL", help="What to evaluate, see above; may be given again."
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="The run folder: journal, results and figure.")
    ],
    instruct: Annotated[
        str | None,
        typer.Argument(
            metavar="INSTRUCT",
            help="The instruct checkpoint, λ = 1; not needed with --delta, and checked if given.",
        ),
    ] = None,
    store: Annotated[
        str,
        typer.Option(
            metavar="S",
            help="How the delta is held: auto, dense, packed, sparse, lowrank or attached.",
        ),
    ] = "auto",
    residency: Annotated[
        str,
        typer.Option(
            metavar="R",
            help="Where the delta is kept for a GPU: auto, device, or host (pinned memory).",
        ),
    ] = "auto",
    delta: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Delta file of `pa-fast encode`, instead of INSTRUCT."),
    ] = None,
    objective: Objective = None,
    keep: Keep = None,
    budget: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most λ of auto: 6 to 12; 12 by default.")
    ] = None,
    confirm: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="After a sweep with a lossy delta, evaluate the best N points again, exactly.",
        ),
    ] = 0,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Dtype = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Tokenizer for all λ; INSTRUCT's by default.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests per forward pass, at every λ.")
    ] = 8,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="At most N items per evaluator, evenly over groups."),
    ] = None,
    rounding: RoundingOption = "nearest",
    rule: RuleOption = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of shots, of --limit and of stochastic rounding.")
    ] = 0,
    engine: Annotated[
        str,
        typer.Option(
            metavar="E",
            help="transformers; tensor-parallel: one model over all ranks of torchrun; vllm; or"
            " sglang, not run for real yet.",
        ),
    ] = "transformers",
    engine_args: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An argument of vllm.LLM or sglang.Engine, such as tensor_parallel_size=2; may be"
            " given again.",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Ray worker processes, each with a GPU or a share of the cores.",
        ),
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Every Nth λ, from number I (0 to N − 1) on; auto: as torchrun or SLURM set them.",
        ),
    ] = None,
    extra_rows: ExtraRows = "instruct",
    one_sided: OneSided = None,
    ignore_config: IgnoreConfig = None,
    strip_prefix: StripPrefix = None,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start afresh in a folder that holds a sweep.")
    ] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T", help="Log to wandb, trackio or tensorboard too; may be given again."
        ),
    ] = None,
    log_format: Annotated[
        str,
        typer.Option(
            metavar="F", help="Progress on stderr: text for people, or json, an object a line."
        ),
    ] = "text",
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html at the end.")
    ] = True,
    report_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Write it after every N points too."),
    ] = None,
) -> None:
    from pa_fast.rules import LambdaRule
    from pa_fast.run import SweepSpec

    output = sweep_output(log_format)
    with output.errors():
        job = SweepSpec(
            base,
            instruct,
            lambdas,
            tuple(evals),
            out,
            limit=limit,
            seed=seed,
            overwrite=overwrite,
            engine=engine,
            engine_args=tuple(engine_args or ()),
            device=device,
            dtype=dtype,
            store=store,
            residency=residency,
            delta=delta,
            rounding=rounding,
            rule=None if rule is None else LambdaRule.load(rule),
            tokenizer=tokenizer,
            batch_size=batch_size,
            allow_nonfinite=allow_nonfinite,
            extra_rows=extra_rows,
            one_sided=one_sided,
            ignore_config=tuple(ignore_config or ()),
            strip_prefix=tuple(strip_prefix or ()),
            objective=objective,
            keep=tuple(keep or ()),
            budget=budget,
        )
        _run(
            job,
            output,
            confirm=confirm,
            workers=workers,
            shard=shard,
            track=track or (),
            report=report,
            report_every=report_every,
        )


def _run(
    job: SweepSpec,
    output: SweepOutput,
    *,
    confirm: int,
    workers: int,
    shard: str | None,
    track: Sequence[str],
    report: bool,
    report_every: int | None,
) -> None:
    """Run the sweep of a command line, and print its results."""
    from pa_fast.files import check_outside
    from pa_fast.run import check_beside_delta, check_confirm
    from pa_fast.run import confirm as run_again
    from pa_fast.sweep.driver import failing_alike
    from pa_fast.sweep.progress import Callbacks
    from pa_fast.trackers import tracker

    if confirm and shard is not None:
        raise UsageError(
            "--confirm and --shard together",
            "confirm when all shards are done: run the same command without --shard",
        )
    if report_every is not None and not report:
        raise UsageError(
            f"--report-every {report_every} and --no-report together", "leave out one of the two"
        )
    if confirm:
        check_confirm(job)
    else:
        check_beside_delta(job)
    check_outside(job.out, (job.base, job.instruct, job.tokenizer))
    # a delta takes the place of INSTRUCT, which then serves to confirm and for its tokenizer alone
    swept = (
        job
        if job.delta is None
        else dataclasses.replace(job, instruct=None, tokenizer=job.tokenizer or job.instruct)
    )
    trackers = [tracker(kind, job.out, _tracked(job)) for kind in track]
    callbacks: list[object] = [*trackers]
    if report_every is not None:
        callbacks.append(_Refresh(Path(job.out), report_every, output.progress.noted))
    heard = cast("Progress", Callbacks(output.progress, callbacks, None))
    try:
        result = _launch(swept, workers, shard, heard)
        if result is not None:
            for one in trackers:
                one.on_end(result)
    except KeyboardInterrupt:
        arguments = [part for part in sys.argv[1:] if part != "--overwrite"]
        output.interrupted(["pa-fast", *arguments])
        raise typer.Exit(130) from None
    finally:
        for one in trackers:
            one.close()
    if result is None:
        return  # on this rank; the first one prints
    output.answer(result)
    if report:
        from pa_fast.report import write  # SciPy

        write([result], output.note)
    output.folder(result, report)
    if confirm:
        confirmed = run_again(job, result, confirm, output.progress)
        output.answer(confirmed, "confirmed with an exact store")
        output.folder(confirmed, False)
        result = dataclasses.replace(result, failures=result.failures + confirmed.failures)
    if result.failures:
        output.failures(result)
        failing = failing_alike(result)
        raise PaFastError(
            f"{len(result.failures)} of"
            f" {format_count(len(result.failures) + len(result.rows), 'point')} failed",
            (
                "the same command tries the failed points once more, and keeps the finished ones:"
                " run it again at once where the cause may have passed, such as a lack of memory;"
                " else mend first what the message names"
                if any(failure.evaluator not in failing for failure in result.failures)
                else (
                    "they fail alike at every λ: mend what the message names, then run the same"
                    " command again; finished points are kept"
                )
            ),
        )


def _tracked(job: SweepSpec) -> dict[str, object]:
    """Return what a tracker records of a sweep: its options that are not their defaults."""
    fields = dataclasses.fields(job)
    values = {f.name: getattr(job, f.name) for f in fields if getattr(job, f.name) != f.default}
    return {k: v if isinstance(v, (str, int, float)) else str(v) for k, v in values.items()}


class _Refresh:
    """A callback of a sweep that writes its report after every `every` points."""

    def __init__(self, out: Path, every: int, noted: Callable[[str], object]):
        self._out, self._every, self._noted = out, every, noted
        self._count = 0

    def on_score(self, entry: object) -> None:
        from pa_fast.report import write
        from pa_fast.sweep.results import SweepResult

        self._count += 1
        if self._count % self._every == 0:
            write([SweepResult.load(self._out)], self._noted)


def _launch(
    job: SweepSpec, workers: int, shard: str | None, progress: Progress
) -> SweepResult | None:
    """Run `job` in the requested number of processes; None on ranks that leave the output to the
    first."""
    if shard is not None and workers > 1:
        raise UsageError(
            "--workers and --shard together",
            "--workers starts processes here; --shard is one of several",
        )
    if job.engine == "tensor-parallel":
        if shard is not None or workers > 1:
            raise UsageError(
                "--engine tensor-parallel with --workers or --shard",
                "its ranks are one worker: start it with torchrun",
            )
        from pa_fast.launch import lockstep

        return lockstep.run(job, progress)
    if workers > 1:
        from pa_fast.launch import ray

        return ray.run(job, workers, progress)
    from pa_fast.launch import environment
    from pa_fast.run import run
    from pa_fast.sweep.entry import Shard

    if shard is None:
        return run(job, progress)
    part = Shard(*environment.shard()) if shard == "auto" else Shard.parse(shard)
    return run(job, progress, (part.rank, part.world))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Run folders of sweeps.")],
    latex: Annotated[
        bool, typer.Option("--latex", help="Print a table for a paper instead: λ̂, gain and cost.")
    ] = False,
    objective: Objective = None,
    keep: Keep = None,
) -> None:
    """Print the results of runs, and write their files again.

    results.csv, results.json, the figure and report.html of each run are made anew from its
    journal. Of several runs, report.html of the first one shows all of them. With --objective or
    --keep, the answer is to that question in place of the sweep's, on the terminal and in these
    files alike, until the next report or sweep.
    """
    from pa_fast.question import parse_keep
    from pa_fast.report import write
    from pa_fast.sweep.report import report as run
    from pa_fast.sweep.results import table

    unwritten: list[str] = []
    results = run(
        runs,
        noted=unwritten.append,
        objective=objective,
        keep=parse_keep(keep) if keep else None,
    )
    reports = write(results, unwritten.append)
    if latex:
        from pa_fast.report.statistics import latex as as_latex

        for line in as_latex(reports).splitlines():
            tell(line)
    else:
        for result in results:
            say_answer(result, f"{one_line(result.out.name)}: " if len(results) > 1 else "")
        show(table(results))
    for note in unwritten:
        say(f"note: {note}")
    for result in results:
        say_where(result)
