"""Vocabulary rows that one side alone has: which tensors have them, and whether they may be kept.

A row of an embedding or output head belongs to a token id. Where one side has more rows, the ids
that both have are merged and the rest is kept as it is, from the side that has it, at every λ.
Nothing here knows an architecture: a tensor has vocabulary rows if its first size is a `vocab_size`
of its own config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.header import FLOATS, TensorInfo
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.vocabulary import compare_vocabularies
from pa_fast.errors import PairError

Rows = dict[str, tuple[int, int]]
"""Tensor name → vocabulary rows in base and in instruct."""


@dataclass(frozen=True)
class KeptRows:
    """Rows `first` to `last` of `tensors`, which `side` alone has, and which are its own at every
    λ."""

    side: str
    first: int
    last: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        which = (
            f"row {self.first}" if self.first == self.last else f"rows {self.first} to {self.last}"
        )
        return (
            f"{which} of {', '.join(map(quoted, self.tensors))}: in {self.side} only, kept as they"
            " are at every λ"
        )


def vocabulary_sizes(config: Mapping[str, Any]) -> frozenset[int]:
    """Every `vocab_size` that a configuration states, those of nested models too."""
    found = {value for key, value in config.items() if key == "vocab_size" and type(value) is int}
    return frozenset(found).union(
        *(vocabulary_sizes(part) for part in config.values() if isinstance(part, Mapping))
    )


def may_be_extended(
    base: tuple[int, ...], instruct: tuple[int, ...], sizes: tuple[frozenset[int], frozenset[int]]
) -> bool:
    """Whether two shapes differ in vocabulary rows alone; `sizes` are the vocabulary sizes of base
    and instruct."""
    return (
        bool(base and instruct)
        and base[1:] == instruct[1:]
        and base[0] in sizes[0]
        and instruct[0] in sizes[1]
    )


def with_vocabulary_sizes(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    """`config` with every `vocab_size` that is a key of `sizes` replaced by its value."""
    made = {
        key: with_vocabulary_sizes(value, sizes) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    stated = made.get("vocab_size")
    return (
        {**made, "vocab_size": sizes[stated]} if type(stated) is int and stated in sizes else made
    )


def extended(
    base: Mapping[str, TensorInfo], instruct: Mapping[str, TensorInfo], *configs: Mapping[str, Any]
) -> Rows:
    """Float tensors on both sides whose shapes differ in vocabulary rows alone; `configs` are
    base's and instruct's."""
    sizes = vocabulary_sizes(configs[0]), vocabulary_sizes(configs[1])
    return {
        name: (base[name].shape[0], info.shape[0])
        for name, info in instruct.items()
        if name in base
        and base[name].shape != info.shape
        and {base[name].dtype, info.dtype} <= FLOATS
        and may_be_extended(base[name].shape, info.shape, sizes)
    }


def check_vocabulary(
    base: Checkpoint, instruct: Checkpoint, rows: Rows, extra_rows: str
) -> tuple[str, ...]:
    """Compare what token ids mean, and apply the policy to vocabulary rows that one side alone has.

    Args:
        rows: tensors that have such rows, see `extended`.
        extra_rows: `instruct` keeps such rows as they are, `refuse` does not pair.

    Returns: sentences worth telling the user.

    Raises:
        PairError: an id means different tokens; rows are refused, or nothing proves that their ids
            mean the same.
        CheckpointError: a tokenizer.json is not one.
    """
    notes = compare_vocabularies(base.folder, instruct.folder, required=bool(rows))
    if rows and extra_rows == "refuse":
        name, (b, i) = next(iter(rows.items()))
        found = f"{b} vocabulary rows in base and {i} in instruct, expected as many"
        raise PairError(
            f"tensor {quoted(name)}: {found}",
            "--extra-rows instruct keeps rows that one side alone has",
        )
    return notes + tuple(map(str, kept_rows(rows)))


def kept_rows(rows: Rows) -> tuple[KeptRows, ...]:
    """What of `rows` one side alone has, tensors of equal rows together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, sizes in rows.items():
        groups.setdefault(sizes, []).append(name)
    return tuple(
        KeptRows("base" if b > i else "instruct", min(b, i), max(b, i) - 1, tuple(names))
        for (b, i), names in groups.items()
    )
