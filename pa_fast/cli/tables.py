"""Tables for a terminal of any width: numbers and words are never broken; columns that do not fit
are printed below the others."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.table import Column, Table

# a space, or behind a mark that joins the parts of a name; 1,020,544 and 0.25 are no names
_BREAK = re.compile(r" +|(?<=[,:/.])(?!(?<=\d.)\d)")


def blocks(table: Table, width: int) -> list[Table]:
    """Return `table` as tables of at most `width` characters, each with the first column of
    `table`; the table itself if it fits.

    If it does not fit, headers are wrapped and columns are split over several tables. Cells are
    wrapped if a column does not fit beside the first one, or if the first one takes more than half
    of `width`. A single word that is wider than `width` is not broken.
    """
    columns = [_ColumnSize.of(table, column) for column in table.columns]
    if sum(column.full for column in columns) + _frame(table, columns) <= width:
        return [table]
    first, *others = columns
    first = first.least_beside([], width // 2)
    groups: list[list[_ColumnSize]] = []
    for column in others:
        least = column.least_beside([first], width - _frame(table, [first, column]))
        tried = [first, *(groups[-1] if groups else []), least]
        if not groups or sum(one.least for one in tried) + _frame(table, tried) > width:
            groups.append([])
        groups[-1].append(least)
    tables = [_of_columns(table, [first, *group], width) for group in groups or [[]]]
    for block in tables[:-1]:
        block.caption = None
    return tables


@dataclasses.dataclass(frozen=True)
class _ColumnSize:
    """A column of a table: its content as texts, and its widths in characters.

    Attributes:
        padding: width of the padding beside the content.
        full: width of the content without wrapping.
        least: smallest width to which the content can be wrapped.
        wraps: True if cells may be wrapped; otherwise only the header may.
    """

    column: Column
    header: Text
    cells: list[Text]
    padding: int
    full: int
    least: int
    wraps: bool = False

    @classmethod
    def of(cls, table: Table, column: Column) -> _ColumnSize:
        header, *cells = map(_text, (column.header, *column._cells))
        widest = max(map(_width, cells), default=0)
        padding = table._get_padding_width(column._index)
        full, least = max(widest, _width(header)), max(widest, _longest_piece(header))
        return cls(column, header, cells, padding, full, least)

    def least_beside(self, others: Sequence[_ColumnSize], width: int) -> _ColumnSize:
        """Return the column with the smallest width at which it and `others` fit `width`: with
        wrapped cells if they do not fit otherwise."""
        if self.least + sum(other.least for other in others) <= width:
            return self
        pieces = max(map(_longest_piece, (self.header, *self.cells)))
        return dataclasses.replace(self, least=pieces, wraps=True)

    def of_width(self, width: int, index: int) -> Column:
        """Return column number `index` of a table, wrapped to `width`."""
        column = dataclasses.replace(
            self.column,
            header=_wrapped(self.header, width),
            width=width,
            min_width=None,
            no_wrap=True,
            _index=index,
        )
        column._cells = [_wrapped(cell, width) if self.wraps else cell for cell in self.cells]
        return column


def _of_columns(table: Table, columns: Sequence[_ColumnSize], width: int) -> Table:
    """Return `table` with only these of its columns, each as wide as its content and `width`
    allow."""
    widths = [column.least for column in columns]
    for _ in range(width - sum(widths) - _frame(table, columns)):
        lacking = [column.full - own for column, own in zip(columns, widths)]
        if max(lacking) <= 0:
            break
        widths[lacking.index(max(lacking))] += 1
    part = copy.copy(table)
    part.columns = [
        column.of_width(own, index) for index, (column, own) in enumerate(zip(columns, widths))
    ]
    return part


def _frame(table: Table, columns: Sequence[_ColumnSize]) -> int:
    """Return the width of edges, dividers and padding around `columns`."""
    edges = 2 if table.box and table.show_edge else 0
    dividers = len(columns) - 1 if table.box else 0
    return edges + dividers + sum(column.padding for column in columns)


def _text(content: object) -> Text:
    return content if isinstance(content, Text) else Text(str(content))


def _width(text: Text) -> int:
    return max((line.cell_len for line in text.split("\n")), default=0)


def _longest_piece(text: Text) -> int:
    return max((_width(piece) for line in text.split("\n") for piece in _pieces(line)), default=0)


def _pieces(line: Text) -> list[Text]:
    """Return the pieces between which a line may be broken."""
    offsets = [0, *_piece_ends(line)]
    return [_cut(line, start, end) for start, end in itertools.pairwise(offsets)]


def _wrapped(text: Text, width: int) -> Text:
    """Return `text` on lines of at most `width`, broken only between pieces."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        start = end = 0
        for after in _piece_ends(line):
            if end > start and _cut(line, start, after).cell_len > width:
                lines.append(_cut(line, start, end))
                start = end
            end = after
        lines.append(_cut(line, start, end))
    return Text("\n").join(lines)


def _piece_ends(line: Text) -> list[int]:
    """Return the offsets at which the pieces of a line end, trailing spaces included."""
    return [*(match.end() for match in _BREAK.finditer(line.plain)), len(line)]


def _cut(line: Text, start: int, end: int) -> Text:
    piece = line[start:end]
    piece.rstrip()
    return piece
