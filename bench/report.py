"""From tables to what people read: a CSV, a Markdown table, and the block of
docs/benchmarks.md with its figure.

`python -m bench.report FILE.json …` writes them again from runs of one machine; `--page` also
brings that page up to date.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench import figure
from bench.cases import TARGETS
from bench.machine import ROOT, Machine
from pa_fast.throughput.harness import Table

RESULTS = ROOT / "bench" / "results"
LAST = ROOT / ".benchmarks" / "last.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU = "needs a GPU: `make gpu`"
NOISE = "noise"
"""The column of the same version timed twice, the second over the first."""
MEASURED = (
    "rounds",
    "median_s",
    "lowest_s",
    "spread",
    "cpu_s",
    "gbps",
    "of_copy",
    "of_stream",
    "peak_bytes",
    "ratio",
    "noise_ratio",
    "headline",
    "met",
)
"""Columns of the CSV that time or memory went into."""


@dataclass
class Report:
    """One run of benchmarks: printed and on disk as soon as it is there, so that a kill loses
    nothing.

    Attributes:
        folder: where CSV and Markdown go; None keeps the run to itself.
        stem: of their names; None takes day, machine and size, and leaves an earlier run's alone.
        json: where the run is kept for `read`.
        rehearsal: no figure means anything, so none is printed, and none is in the CSV.
    """

    machine: Machine
    size: str
    tables: list[Table] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folder: pathlib.Path | None = None
    json: pathlib.Path | None = None
    rehearsal: bool = False
    stem: str | None = None

    def add(self, table: Table) -> None:
        """Print a table and write the run with it; a case that is there already is replaced."""
        key = (table.target, table.case)
        self.tables = [one for one in self.tables if (one.target, one.case) != key] + [table]
        self.tables.sort(key=lambda one: [*TARGETS, one.target].index(one.target))
        if self.rehearsal:
            print(*(f"{table.title}: {way.name}" for way in table.ways), sep="\n")
            if table.goal:
                print(f"{table.target}: {table.goal}: not judged in a rehearsal", flush=True)
        else:
            print(f"\n{table.text()}", flush=True)
        self.write()

    def note(self, text: str) -> None:
        """Print a sentence, and write the run with it."""
        self.notes.append(text)
        print(f"{text.partition(':')[0]}: a note on what was timed" if self.rehearsal else text)
        self.write()

    @classmethod
    def read(cls, files: Sequence[pathlib.Path]) -> Report:
        """The tables of all `files`; a case that several have is the last one's."""
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        tables = {
            (table.target, table.case): table
            for run in runs
            for table in map(Table.from_json, run["tables"])
        }
        failed, skipped, notes = (
            [*itertools.chain.from_iterable(run[name] for run in runs)]
            for name in ("failed", "skipped", "notes")
        )
        machine = Machine(**runs[-1]["machine"])
        ordered = sorted(tables.values(), key=lambda one: [*TARGETS, one.target].index(one.target))
        return cls(machine, runs[-1]["size"], ordered, failed, skipped, notes)

    def write(self) -> list[pathlib.Path]:
        """Write JSON, CSV and Markdown, each whole or not at all. Returns the files; in a rehearsal
        there is no Markdown."""
        texts = {}
        if self.json is not None:
            run = {name: vars(self)[name] for name in ("size", "failed", "skipped", "notes")}
            tables = [table.to_json() for table in self.tables]
            texts[self.json] = json.dumps({**run, "machine": vars(self.machine), "tables": tables})
        if self.folder is not None:
            self.stem = self.stem or self._free_stem(self.folder)
            texts[self.folder / f"{self.stem}.csv"] = self.csv()
            if not self.rehearsal:
                texts[self.folder / f"{self.stem}.md"] = self.markdown()
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(text, encoding="utf-8", newline="")
            os.replace(partial, path)
        return list(texts)

    def _free_stem(self, folder: pathlib.Path) -> str:
        name = f"{self.machine.date}-{self.machine.kind}-{self.size}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not (folder / f"{name}.csv").exists())

    def csv(self) -> str:
        """One row for each way of each case."""
        text = io.StringIO()
        rows = list(self._rows())
        if self.rehearsal:
            rows = [row | dict.fromkeys(MEASURED, "") for row in rows]
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return text.getvalue()

    def _rows(self) -> Iterator[dict[str, object]]:
        where = {**vars(self.machine), "size": self.size}
        for table in self.tables:
            for way in table.ways:
                share = {
                    f"of_{name}": _digits(way.gbps and way.gbps / table.ceilings[name], 4)
                    if name in table.ceilings
                    else ""
                    for name in ("copy", "stream")
                }
                yield {
                    **where,
                    "target": table.target,
                    "case": table.case,
                    "way": way.name,
                    "rounds": len(way.seconds),
                    "median_s": _digits(way.median_s),
                    "lowest_s": _digits(min(way.seconds)),
                    "spread": _digits(way.spread, 3),
                    "cpu_s": _digits(way.cpu_s),
                    "moved_bytes": way.moved_bytes,
                    "gbps": _digits(way.gbps, 4),
                    **share,
                    "peak_bytes": way.peak_bytes,
                    "kept_bytes": way.kept_bytes,
                    "bytes_per_weight": _digits(way.bytes_per_weight),
                    "wrong_share": way.wrong_share,
                    "effective_lambda": way.effective_lambda,
                    "against": table.against,
                    "ratio": _digits(table.ratio(way), 4),
                    "noise_ratio": table.noise_text,
                    "goal": table.goal,
                    "headline": table.headline,
                    "met": "" if table.met is None else table.met,
                    "note": way.note,
                }

    def markdown(self) -> str:
        """Everything: the promises, then each table."""
        parts = [
            f"# Benchmarks of {self.machine.date}, {self.machine.kind}",
            self.where(),
            self.promises(),
        ]
        for table in self.tables:
            words = [
                f"{table.rounds.capitalize()}; ratios are seconds over those of `{table.against}`."
            ]
            words += [f"Goal: {table.goal}."] * bool(table.goal)
            words += [f"Here: {table.verdict}."] * bool(table.headline)
            words += [f"The same version timed twice: {table.noise_text}."] * bool(table.noise_text)
            columns = table.columns()
            parts += [
                f"## {table.title}",
                " ".join(words),
                _table(list(columns), list(zip(*columns.values()))),
            ]
        for what, lines in (
            ("Notes", self.notes),
            ("Failed, so without a speed", self.failed),
            ("Skipped", self.skipped),
        ):
            if lines:
                parts.append("\n".join([f"{what}:", *(f"- {line}" for line in lines)]))
        return "\n\n".join(parts) + "\n"

    def where(self) -> str:
        """The machine, in a sentence."""
        commit = f", commit {self.machine.commit}" if self.machine.commit else ""
        tests = f", {self.machine.tests}" if self.machine.tests else ""
        return (
            f"{self.machine.model}; {self.machine.versions}; {self.machine.date}{commit}{tests},"
            f" size {self.size}."
        )

    def promises(self) -> str:
        """A row for each promise and what was found about it; what a GPU alone can tell says so."""
        return _table(["", "what", "goal", "here", NOISE], self._promised())

    def summary(self) -> str:
        """The same for a terminal."""
        rows = [
            f"{name:4} {what}\n       goal: {goal}\n       here: {here}"
            for name, what, goal, here, _ in self._promised()
        ]
        return "\n".join([*rows, "", self.where()])

    def _promised(self) -> list[list[str]]:
        rows = []
        on_gpu = not self.machine.kind.startswith("cpu")
        for name, target in TARGETS.items():
            measured = [one for one in self.tables if one.target == name and one.headline]
            goal = target.gpu_goal if on_gpu else target.goal
            rows += [
                [name, one.case, one.goal or goal, one.verdict, one.noise_text] for one in measured
            ]
            if goal and not measured:
                rows.append([name, target.what, goal, "not measured in this run", ""])
            if target.gpu_goal and not on_gpu:
                rows.append([name, f"{target.what}, on a GPU", target.gpu_goal, GPU, ""])
        return rows

    def block(self, image: str | None) -> str:
        """What stands between the page's markers."""
        shown = (
            [f"![Seconds per λ: pa_fast in place, and merge to disk with a reload]({image})"]
            if image
            else []
        )
        said = (
            f"Medians of ways timed in turn; *{NOISE}* is the same version timed twice, second over"
            f" first. {self.where()}"
        )
        return "\n\n".join([self.promises(), said, *shown])


def put(text: str, block: str) -> str:
    """`text` with `block` between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"write {BEGIN} and {END} where the results belong, each once")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


def _digits(value: float | None, digits: int = 6) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def update(report: Report, page: pathlib.Path) -> None:
    """Bring the page's block, and the figure where the sweep was timed, up to date."""
    image = figure.write(report.tables, page.parent / figure.PLACE)
    name = f"{figure.PLACE}.png" if image else None
    page.write_text(put(page.read_text(encoding="utf-8"), report.block(name)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    report = Report.read(options.files)
    report.folder = options.out
    print(*report.write(), sep="\n")
    if options.page:
        update(report, PAGE)
        print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
