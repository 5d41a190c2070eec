"""From pytest-benchmark's JSON to what people read: a CSV, a Markdown table, and the block of
docs/benchmarks.md with its figure.

`python -m bench.report FILE.json …` writes them again from runs of one machine; `--page` also
brings that page up to date.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import figure
from bench.cases import TARGETS
from bench.machine import ROOT, Machine
from bench.table import KEY, Table

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU = "needs a GPU: `make gpu`"
NOISE = "noise"
"""The column of the same version timed twice, the second over the first."""


@dataclass(frozen=True)
class Report:
    """What one run of the benchmarks found."""

    machine: Machine
    size: str
    tables: tuple[Table, ...]
    failed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @classmethod
    def read(cls, files: Sequence[pathlib.Path]) -> Report:
        """The tables of all `files`; a case that several have is the last one's."""
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        found = {}
        for run in runs:
            for table in (
                Table.of(one)
                for benchmark in run["benchmarks"]
                for one in benchmark["extra_info"].get(KEY, [])
            ):
                found[table.target, table.case] = table
        order = list(TARGETS)
        tables = sorted(
            found.values(),
            key=lambda table: order.index(table.target) if table.target in order else len(order),
        )
        last = runs[-1]["run"]
        failed = [name for run in runs for name in run["run"]["failed"]]
        skipped = [
            f"{name}: {reason}" for run in runs for name, reason in run["run"]["skipped"].items()
        ]
        return cls(
            Machine(**last["machine"]), last["size"], tuple(tables), tuple(failed), tuple(skipped)
        )

    def write(self, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
        """The CSV and the Markdown, named by day, machine and size; those of an earlier run that
        day are replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.machine.date}-{self.machine.kind}-{self.size}"
        made = (folder / f"{stem}.csv", folder / f"{stem}.md")
        for path, text in zip(made, (self.csv(), self.markdown())):
            path.write_text(text, encoding="utf-8", newline="")
        return made

    def csv(self) -> str:
        """One row for each way of each case."""
        text = io.StringIO()
        rows = list(self._rows())
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return text.getvalue()

    def _rows(self) -> Iterator[dict[str, object]]:
        where = {**vars(self.machine), "size": self.size}
        for table in self.tables:
            for way in table.ways:
                yield {
                    **where,
                    "target": table.target,
                    "case": table.case,
                    "way": way.name,
                    "rounds": len(way.seconds),
                    "median_s": f"{way.median_s:.6g}",
                    "lowest_s": f"{min(way.seconds):.6g}",
                    "cpu_s": "" if way.cpu_s is None else f"{way.cpu_s:.6g}",
                    "moved_bytes": way.moved_bytes,
                    "gbps": "" if way.gbps is None else f"{way.gbps:.4g}",
                    "peak_bytes": way.peak_bytes,
                    "kept_bytes": way.kept_bytes,
                    "wrong_share": way.wrong_share,
                    "effective_lambda": way.effective_lambda,
                    "against": table.against,
                    "ratio": f"{table.ratio(way):.4g}",
                    "noise_ratio": table.noise_said,
                    "goal": table.goal,
                    "headline": table.headline,
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
            about = [
                f"{table.rounds.capitalize()}; ratios are seconds over those of `{table.against}`."
            ]
            about += [f"Goal: {table.goal}."] * bool(table.goal) + [
                f"Here: {table.headline}."
            ] * bool(table.headline)
            about += [f"The same version timed twice: {table.noise_said}."] * bool(table.noise)
            parts += [f"## {table.title}", " ".join(about), _table(*table.cells())]
        for what, names in (("Failed, so without a speed", self.failed), ("Skipped", self.skipped)):
            if names:
                parts.append("\n".join([f"{what}:", *(f"- {name}" for name in names)]))
        return "\n\n".join(parts) + "\n"

    def where(self) -> str:
        """The machine, in a sentence."""
        commit = f", commit {self.machine.commit}" if self.machine.commit else ""
        return (
            f"{self.machine.model}; {self.machine.versions}; {self.machine.date}{commit}, size"
            f" {self.size}."
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
        for name, target in TARGETS.items():
            found = [table for table in self.tables if table.target == name and table.headline]
            for table in found:
                rows.append(
                    [name, table.case, table.goal or target.goal, table.headline, table.noise_said]
                )
            if target.goal and not found:
                rows.append([name, target.what, target.goal, "not measured in this run", ""])
            if target.gpu_goal:
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


def _table(header: list[str], rows: list[list[str]]) -> str:
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
    print(*report.write(options.out), sep="\n")
    if options.page:
        update(report, PAGE)
        print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
