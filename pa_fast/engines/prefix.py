"""Which tokens of many requests are computed once: requests as a small forest of shared prefixes.

A request is a list of token ids. Requests that begin alike hang under one segment, which holds the
tokens that they share; the rest of each is a segment of its own below it. Two levels are enough for
what evaluations ask: examples that all items show, the prompt that all answers of an item follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

LEVELS = 2

_WORTH = 4
"""Share where it saves one token in so many: a segment more costs a pass more, and smaller batches
below it."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `stop` of request `row`, to be computed after those of the segment above.

    `under` are the segments that go on from here; a segment without any is the end of its request.
    The requests below all begin with the same `stop` tokens, so that any of them can stand for the
    others.
    """

    row: int
    start: int
    stop: int
    under: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


def forest(rows: Sequence[Sequence[int]], most: Sequence[int]) -> list[Segment]:
    """Segments that together compute N requests, each to its end, once.

    Args:
        rows: token ids of each request, at least one.
        most: how many leading tokens of each request may be computed for others, too: fewer than it
            has.

    A function of the requests alone. Cost: a sort, and one comparison of neighbours.
    """
    order = sorted(range(len(rows)), key=lambda k: (rows[k], k))
    shared = [min(_common(rows[a], rows[b]), most[a], most[b]) for a, b in pairwise(order)]
    return list(_grown(rows, order, shared, 0, LEVELS))


def _grown(
    rows: Sequence[Sequence[int]], order: list[int], shared: list[int], start: int, levels: int
) -> Iterator[Segment]:
    """Segments of requests `order`, sorted; of their neighbours each two share `shared` tokens, all
    of them `start`."""
    pending = [(0, len(order))] if order else []
    while pending:
        low, high = pending.pop()
        group, inside = order[low:high], shared[low : high - 1]
        least = min(inside, default=start)
        if len(group) == 1 or levels == 0:
            yield from (Segment(k, start, len(rows[k])) for k in group)
        elif _WORTH * (least - start) * (len(group) - 1) >= sum(
            len(rows[k]) - start for k in group
        ):
            yield Segment(
                group[0], start, least, tuple(_grown(rows, group, inside, least, levels - 1))
            )
        else:
            cuts = [low, *(low + n + 1 for n, common in enumerate(inside) if common == least), high]
            pending += pairwise(cuts)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
