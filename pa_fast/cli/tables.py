"""Tables for a terminal of any width: figures and words are never broken, columns go below one
another instead."""

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
    """`table` as tables of at most `width` columns of the terminal, each with its first column;
    itself where it fits.

    Where it does not, headers are wrapped, and columns are put below others; cells are wrapped
    where a column is too wide beside the first, or the first for any other. One word that is wider
    than the terminal stays whole.
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
    """A column: its content as texts, how wide it is, and how narrow it can be. `wraps` says
    whether cells may be wrapped for that, or headers alone."""

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
        """This column as it fits `width` beside `others`, if wrapping its cells can make it."""
        if self.least + sum(other.least for other in others) <= width:
            return self
        pieces = max(map(_longest_piece, (self.header, *self.cells)))
        return dataclasses.replace(self, least=pieces, wraps=True)

    def of_width(self, width: int, index: int) -> Column:
        """The column, so wide."""
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
    """`table` with these of its columns alone, as wide as they want to be and `width` allows."""
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
    """Return the width of what stands beside the content of `columns`: edges, dividers and
    padding."""
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
    """Return the pieces that may stand on a line of their own."""
    offsets = [0, *_piece_ends(line)]
    return [_cut(line, start, end) for start, end in itertools.pairwise(offsets)]


def _wrapped(text: Text, width: int) -> Text:
    """`text` on lines of at most `width`, broken between pieces alone."""
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
    """Return the offsets at which the pieces of a line end, with the spaces behind them."""
    return [*(match.end() for match in _BREAK.finditer(line.plain)), len(line)]


def _cut(line: Text, start: int, end: int) -> Text:
    piece = line[start:end]
    piece.rstrip()
    return piece
