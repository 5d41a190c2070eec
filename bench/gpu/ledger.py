"""Rows of measurements: printed, and on disk the moment they are there, so that a kill loses
nothing."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Row:
    """One thing that was timed, or one goal with what was found.

    Attributes:
        stage, what: where it belongs, and its name there.
        target, goal, figure, met: P row, its words, what was found in the same words, and yes or
            no; of a verdict alone.
        weights, moved_bytes, bytes_per_weight: elements switched; read and written per run; kept in
            all per weight.
        ms, spread: median, and (largest − least) / median of the rounds.
        gbps, of_copy, of_stream: 10⁹ bytes/s; shares of the two ceilings of this run.
        ratio, against: median over that of the row so named.
    """

    stage: str
    what: str
    target: str = ""
    goal: str = ""
    figure: str = ""
    met: str = ""
    weights: int | None = None
    moved_bytes: int | None = None
    bytes_per_weight: float | None = None
    ms: float | None = None
    spread: float | None = None
    gbps: float | None = None
    of_copy: float | None = None
    of_stream: float | None = None
    ratio: float | None = None
    against: str = ""
    note: str = ""


class Ledger:
    """Rows of one run.

    Args:
        path: a CSV file to append to, made with its folder where it is not there; its Markdown lies
            beside it.
        machine: columns that are the same in every row.
        timed: False in a rehearsal: figures are kept out of what is printed, because they mean
            nothing.
    """

    def __init__(self, path: pathlib.Path, machine: Mapping[str, str], timed: bool = True):
        self.path, self.machine, self.timed = path, dict(machine), timed
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        """Print the row and append it to the file."""
        self.rows.append(row)
        print(self._line(row), flush=True)
        columns = [*self.machine, *(field.name for field in fields(Row))]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if file.tell() == 0:
                writer.writeheader()
            rounded = {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
            writer.writerow({**self.machine, **rounded})
            file.flush()
            os.fsync(file.fileno())
        return row

    def say(self, stage: str, text: str) -> None:
        """Record a sentence: what was left out and why, or what a tuning comes to."""
        self.add(Row(stage, "note", note=text))

    def verdict(self, stage: str, target: str, goal: str, figure: str, met: bool) -> None:
        """Record what was found for a goal."""
        self.add(Row(stage, "goal", target, goal, figure, "yes" if met else "no"))

    def write_markdown(self) -> pathlib.Path:
        """Everything in one table beside the CSV, goals first."""
        path = self.path.with_suffix(".md")
        said = ", ".join(f"{name} {value}" for name, value in self.machine.items() if value)
        goals = [row for row in self.rows if row.target]
        lines = [f"# {said}", "", "| goal | found | met |", "|---|---|---|"]
        lines += [f"| {row.target}: {row.goal} | {row.figure} | {row.met} |" for row in goals]
        lines += [
            "",
            (
                "| stage | what | ms | spread | GB/s | of copy | of stream | ratio | bytes per"
                " weight | note |"
            ),
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for row in self.rows:
            if not row.target:
                ratio = "" if row.ratio is None else f"{row.ratio:.3f} × {row.against}"
                shares = (
                    _percent(row.spread),
                    _number(row.gbps),
                    _percent(row.of_copy),
                    _percent(row.of_stream),
                )
                cells = (
                    row.stage,
                    row.what,
                    _number(row.ms),
                    *shares,
                    ratio,
                    _number(row.bytes_per_weight),
                    row.note,
                )
                lines.append(f"| {' | '.join(cells)} |")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _line(self, row: Row) -> str:
        if row.target:
            found = (
                f"{row.figure}: {'met' if row.met == 'yes' else 'NOT MET'}"
                if self.timed
                else "not judged in a rehearsal"
            )
            return f"{row.target}: {row.goal}: {found}"
        if row.what == "note":
            return (
                f"{row.stage}: {row.note}"
                if self.timed
                else f"{row.stage}: a note on what was timed"
            )
        if not self.timed or row.ms is None:
            return f"{row.stage:10} {row.what}"
        ratio = "" if row.ratio is None else f"{row.ratio:6.3f} × {row.against}"
        shares = (
            f"{_percent(row.of_copy):>6} of copy {_percent(row.of_stream):>6} of stream"
            if row.of_copy
            else ""
        )
        took = f"{row.ms:9.3f} ms ±{_percent(row.spread):5} {_number(row.gbps):>7} GB/s"
        return f"{row.stage:10} {row.what:44} {took} {shares} {ratio}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
