"""Shared prefixes: requests as a forest of segments, of which each is computed once.

A request is a list of token ids. Requests that begin alike are children of one segment, which holds
the tokens that they share; the rest of each is a segment of its own. Two levels are enough for
evaluations: examples that all items show, and the prompt that all answers of an item follow.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel


LEVELS = 2

_WORTH = 4
"""Share a prefix if that saves at least one token in four: another segment costs another pass, and
smaller batches below it."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `stop` of request `row`, to be computed after those of the segment above.

    `under` are the segments that continue this one; a segment without any ends its request. All
    requests below begin with the same `stop` tokens, so `row` may be any of them.
    """

    row: int
    start: int
    stop: int
    under: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


def forest(rows: Sequence[Sequence[int]], most: Sequence[int]) -> list[Segment]:
    """Return segments that together compute N requests, each token that is shared once.

    Args:
        rows: token ids of each request, at least one.
        most: how many leading tokens of each request may be shared: fewer than it has.

    Numerics: a function of the requests alone, so the same at every λ.
    Cost: a sort, and one comparison of neighbours.
    """
    order = sorted(range(len(rows)), key=lambda k: (rows[k], k))
    shared = [min(_common(rows[a], rows[b]), most[a], most[b]) for a, b in pairwise(order)]
    return list(_grown(rows, order, shared, 0, LEVELS))


def _grown(
    rows: Sequence[Sequence[int]], order: list[int], shared: list[int], start: int, levels: int
) -> Iterator[Segment]:
    """Yield the segments of the requests `order`, which are sorted. Neighbours share `shared`
    tokens, and all of them the first `start`."""
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
    """Return the length of the common prefix of `a` and `b`."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# --- past
#
# A borrowed prefix lies in its row as batched generation would have it: zeros on the left, then the
# tokens without a gap. So distances along the cache are distances between tokens, for windows,
# masks and biases.


@dataclass(frozen=True)
class Past:
    """Keys and values of R prefixes, lent to the requests that continue them within one call of an
    engine: the tokens of R segments and of all segments above them.

    Attributes:
        layers: of each layer keys and values, R × heads × tokens × size.
        stops: the column where the tokens of each row end; padding follows.
        rows: request of a segment that continues one of these → its row.
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    stops: Sequence[int] = ()
    rows: Mapping[int, int] = field(default_factory=dict)

    def lend(
        self, batch: Sequence[Segment], keep: bool, device: torch.device
    ) -> tuple[Cache | None, dict[str, Any]]:
        """Return the cache to go on from, and the other arguments of a forward pass over `batch`,
        padded on the right.

        Args:
            keep: the pass's own keys and values will be lent in turn.
        """
        import torch
        from transformers import Cache, DynamicCache

        width, before = max(map(len, batch)), max(segment.start for segment in batch)
        if not self.layers:
            # a causal model never looks at padding on the right, so there is nothing to mask
            mask = torch.ones(len(batch), width, dtype=torch.long, device=device)
            return DynamicCache() if keep else None, {"attention_mask": mask, "use_cache": keep}
        spans = [
            (self.rows[segment.row], self.stops[self.rows[segment.row]], segment.start)
            for segment in batch
        ]
        lent = [_lent_layer()(keys, values, spans, before, keep) for keys, values in self.layers]
        columns = torch.arange(before + width, device=device)
        starts = torch.tensor([[segment.start] for segment in batch], device=device)
        last = torch.tensor([[segment.stop - 1] for segment in batch], device=device)
        return Cache(layers=lent), {
            "attention_mask": (columns >= before - starts).long(),
            # a padded token repeats the last position: the model may have none after it
            "position_ids": (starts + columns[:width]).minimum(last),
            "use_cache": True,
        }

    @classmethod
    def of(cls, cache: Cache, batch: Sequence[Segment], layers: int) -> Past:
        """Return the keys and values that a pass over `batch` left in `cache`.

        Raises:
            EngineError: not the keys and values of every token in every layer.
        """
        before = max(segment.start for segment in batch)
        held = [(layer.keys, layer.values) for layer in cache.layers]
        expected = (len(batch), before + max(map(len, batch)))
        if len(held) != layers or any(
            t is None or (t.shape[0], t.shape[2]) != expected for pair in held for t in pair
        ):
            raise EngineError(
                "the model did not leave keys and values of every token in the cache that it was"
                " given",
                "load the pair with shared_prefix=False",
            )
        stops = [before + len(segment) for segment in batch]
        return cls(
            held,
            stops,
            {child.row: n for n, segment in enumerate(batch) for child in segment.under},
        )


def cache_argument(model: PreTrainedModel) -> str | None:
    """Return the name of the argument by which `model`'s forward pass takes a `Cache`; None where
    it takes none.

    It is recognised by its type, since its name differs: `past_key_values` up to transformers 5.23,
    `cache` from 5.24 on. These two names need no type, which a caller's own model may leave out.
    """
    parameters = inspect.signature(model.forward).parameters
    typed = [
        name
        for name, parameter in parameters.items()
        if re.search(r"\bCache\b", str(parameter.annotation))
    ]
    named = [name for name in ("cache", "past_key_values") if name in parameters]
    return next(iter([*typed, *named]), None)


def obstacle(model: PreTrainedModel) -> str | None:
    """Return the reason why the keys and values of a prefix cannot be shared in `model`; None where
    they can.

    They can where a layer's whole memory of a token is its keys and values, computed from the
    tokens before it alone. Sliding windows are masks over that memory, which is kept in full here,
    so that they cut where they always do.
    """
    from transformers import DynamicCache

    parameters = inspect.signature(model.forward).parameters
    missing = [name for name in ("attention_mask", "position_ids") if name not in parameters]
    if missing or cache_argument(model) is None:
        return f"its forward pass takes no {missing[0] if missing else 'cache'}"
    private = [
        name
        for name in ("_supports_default_dynamic_cache", "_is_stateful")
        if not hasattr(model, name)
    ]
    if private:
        return (
            "this release of transformers does not say what its memory of the text is: it has no"
            f" `{private[0]}`"
        )
    config = model.config.get_text_config(decoder=True)
    usual = (
        model.can_generate() and model._supports_default_dynamic_cache() and not model._is_stateful
    )
    if not usual or not getattr(config, "is_causal", True):
        return "its memory of the text is more than keys and values"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(
        config, "attention_chunk_size", None
    ):
        return "its attention is cut in chunks, which are counted from the first token of a batch"
    try:
        kinds = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    except (KeyError, AttributeError, TypeError, ValueError):
        return "transformers knows no cache for its layers"
    if (
        set(kinds) - {"DynamicLayer", "DynamicSlidingWindowLayer"}
        or len(kinds) != config.num_hidden_layers
    ):
        return "its layers keep or share more than keys and values"
    ropes = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    if any("dynamic" in rope or "longrope" in rope for rope in ropes):
        return "its rotary frequencies depend on the length of the text"
    return None


@functools.cache
def _lent_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Lent(DynamicLayer):
        """Rows of another layer's keys and values, copied only when this layer is computed: one
        layer at a time.

        Args:
            spans: for each row, the row to copy, the column where its tokens end, and their number.
        """

        def __init__(
            self,
            keys: Any,
            values: Any,
            spans: Sequence[tuple[int, int, int]],
            before: int,
            keep: bool,
        ):
            super().__init__()
            self.lazy_initialization(keys, values)
            self._source, self._spans, self._length, self._keep = (
                (keys, values),
                spans,
                before,
                keep,
            )

        def update(
            self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            keys, values = (
                self._joined(old, new) for old, new in zip(self._source, (key_states, value_states))
            )
            self._length = keys.shape[-2]
            if self._keep:
                self.keys, self.values = keys, values
            return keys, values

        def get_seq_length(self) -> int:
            return self._length

        def _joined(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            whole = new.new_empty(*new.shape[:2], self._length + new.shape[2], new.shape[3])
            first = 0
            # neighbours mostly continue one prefix: many small copies take longer than the passes
            for (source, end, count), rows in itertools.groupby(self._spans):
                last = first + sum(1 for _ in rows)
                if count < self._length:
                    whole[first:last, :, : self._length - count] = 0
                whole[first:last, :, self._length - count : self._length] = old[
                    source, :, end - count : end
                ]
                first = last
            whole[:, :, self._length :] = new
            return whole

    return Lent
