"""Two checkpoints of one model, tensor by tensor, however each is cut into shards."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pa_fast.checkpoint.alignment import Aligned, align, listed, stripped
from pa_fast.checkpoint.config import Difference, differences
from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.header import FLOATS, TensorInfo
from pa_fast.checkpoint.pair_options import DEFAULTS, PairOptions
from pa_fast.checkpoint.reader import Checkpoint, torch_dtype
from pa_fast.checkpoint.rows import KeptRows, check_vocabulary, extended, kept_rows
from pa_fast.checkpoint.tying import KEY, OTHER, StoredTwice, TiedHead, is_head, tied_head
from pa_fast.checkpoint.untrained import swapped_sides
from pa_fast.errors import PairError

if TYPE_CHECKING:
    import torch
    from pa_kernels.cores import Scratch


@dataclass(frozen=True)
class Pair:
    """A base and an instruct checkpoint that describe the same model.

    `base` is seen under the names and in the layout of `instruct`. `names` has every tensor of the
    merge in instruct's order on disk, those that one conversion makes together; `shapes` their
    shapes; `differences` are configuration keys that differ without changing the model; `notes` are
    sentences worth telling the user; `tied` is the head that one side alone stores, `kept` are the
    vocabulary rows that one side alone has, `single` the tensors, by side, that only that side has
    and its model does not use. `is_untied` says that the merge has a head of its own, though
    instruct's config.json ties it.
    """

    base: Checkpoint
    instruct: Checkpoint
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    tied: TiedHead | None = None
    kept: tuple[KeptRows, ...] = ()
    single: Mapping[str, str] = field(default_factory=dict)
    is_untied: bool = False

    def is_lerped(self, name: str) -> bool:
        """True for tensors that follow λ; of the others, those of both sides (integers, bool, F64)
        must be equal."""
        return name not in self.single and self.stored("instruct", name).dtype in FLOATS

    def count(self, name: str) -> int:
        """Elements of the merged tensor `name`."""
        return math.prod(self.shapes[name])

    def checkpoint(self, side: str) -> Checkpoint:
        """`base` or `instruct`."""
        return self.base if side == "base" else self.instruct

    def stored(self, side: str, name: str) -> TensorInfo:
        """The tensor of `side` that feeds tensor `name` of the merge: its embedding where it ties
        its head.

        Of a tensor that one side alone has, that side's.
        """
        tensors = self.checkpoint(self.single.get(name, side)).tensors
        return tensors[self.tied.embedding if self.tied and name not in tensors else name]

    def chunk(
        self, side: str, name: str, start: int, stop: int, scratch: Scratch | None = None
    ) -> torch.Tensor:
        """Elements `start` to `stop` of what `side` gives to the flattened tensor `name`, [stop -
        start].

        Vocabulary rows that `side` lacks are the other side's, so that they stay as they are at
        every λ.

        Args:
            scratch: memory to read into, for the use `side`; new memory without it.

        Numerics: exact; a chunk in which both sides' rows meet is of a dtype that holds both.
        Cost: every element is read once.

        Raises:
            DataError: a file cannot be read, or changed since its header was read.
        """
        own, other = self.stored(side, name), self.stored(OTHER[side], name)
        if name in self.single:
            return self._read(self.single[name], own, start, stop, scratch, side)
        end = max(start, min(stop, own.count))
        if end == stop:
            return self._read(side, own, start, stop, scratch, side)
        if end == start:
            return self._read(OTHER[side], other, start, stop, scratch, side)
        return _joined(
            self._read(side, own, start, end, scratch, side),
            self.checkpoint(OTHER[side]).chunk(other.name, end, stop),
        )

    def own_part(self, side: str, name: str, start: int, chunk: torch.Tensor) -> torch.Tensor:
        """The part of `chunk`, from `start` on, that is of that very tensor of `side`: none of a
        tied head, no row it lacks.

        Cost: nothing is read again but where rows of two dtypes meet.
        """
        own = self.stored(side, name)
        if own.name != name or start >= own.count or self.single.get(name, side) != side:
            return chunk[:0]
        if start + chunk.numel() > own.count and chunk.dtype != torch_dtype(own.dtype):
            return self.checkpoint(side).chunk(name, start, own.count)
        return chunk[: own.count - start]

    def _read(
        self, side: str, info: TensorInfo, start: int, stop: int, scratch: Scratch | None, use: str
    ) -> torch.Tensor:
        out = scratch.take(use, stop - start, torch_dtype(info.dtype)) if scratch else None
        return self.checkpoint(side).chunk(info.name, start, stop, out)

    def check_unchanged(self, name: str) -> None:
        """Raise DataError if a file that feeds `name` changed since its header was read: call it
        after reading."""
        for side in ("base", "instruct"):
            self.checkpoint(self.single.get(name, side)).check_unchanged(
                self.stored(side, name).name
            )

    def release(self, name: str) -> None:
        """Let go of what was kept in memory to read `name`: call it after reading a part of it."""
        self.base.release(name)


def pair(base: Checkpoint, instruct: Checkpoint, options: PairOptions = DEFAULTS) -> Pair:
    """Pair two open checkpoints, from headers, config.json and tokenizer.json.

    By tensor names while these agree; else by the places that transformers gives the tensors in the
    model class.

    Raises:
        PairError: the configurations describe different functions, a name is on one side only,
            shapes differ, a dtype cannot be interpolated, or token ids mean different tokens; each
            message names the key or tensor and both values.
        CheckpointError: a tokenizer.json is not one.
    """
    base, instruct = stripped(base, options.strip_prefix), stripped(instruct, options.strip_prefix)
    aligned = align(base, instruct, options.one_sided)
    base, instruct = aligned.base, aligned.instruct
    head = tied_head(base, instruct, aligned.apart)
    tied = head if isinstance(head, TiedHead) else None
    own_head = tied is not None or any(
        is_head(name) and name in base.tensors for name in instruct.tensors
    )
    found = check_configs(base, instruct, tying=not own_head, ignored=options.ignore_config)
    _check_names(base, instruct, aligned, head)
    is_untied = tied is not None or (
        own_head and any(one.key.split(".")[-1] == KEY for one in found)
    )
    names = _in_order(base, instruct, head, aligned)
    made = Pair(
        base, instruct, tuple(names), {}, tuple(found), (), tied, (), aligned.single, is_untied
    )
    sides = {
        side: {name: made.stored(side, name) for name in names} for side in ("base", "instruct")
    }
    rows = extended(sides["base"], sides["instruct"], base.config, instruct.config)
    shapes = {}
    for name in names:
        b, i = sides["base"][name], sides["instruct"][name]
        _check_tensor(name, b, i, name in rows)
        shapes[name] = max(b.shape, i.shape)
    fixed = [name for name in names if not made.is_lerped(name) and name not in made.single]
    notes = swapped_sides(base, instruct)
    notes += (
        [f"{len(fixed)} tensors are not of a merged dtype and must be equal on both sides"]
        if fixed
        else []
    )
    notes += aligned.notes
    notes += [str(head)] if head else []
    notes += check_vocabulary(base, instruct, rows, options.extra_rows)
    notes += config_notes(found)
    return replace(made, shapes=shapes, notes=tuple(notes), kept=kept_rows(rows))


def check_configs(
    base: Checkpoint, instruct: Checkpoint, *, tying: bool = True, ignored: Iterable[str] = ()
) -> list[Difference]:
    """The differences between two config.json that leave the model's function alone, or that the
    user accepts.

    Args:
        tying: whether a head that is tied on one side only counts as another function.
        ignored: keys whose difference is accepted.

    Raises:
        PairError: a key that changes the function differs; the message names it and both values.
    """
    found = differences(
        base.config, instruct.config, frozenset() if tying else frozenset({KEY}), ignored
    )
    serious = [difference for difference in found if not difference.harmless]
    if serious:
        more = f" (and {len(serious) - 5} more keys)" if len(serious) > 5 else ""
        keys = " ".join(
            f"--ignore-config {shlex.quote(difference.key)}" for difference in serious[:5]
        )
        hint = (
            "use base and instruct of one model; where a difference does not matter, accept it:"
            f" {keys}"
        )
        if all(difference.key.endswith(KEY) for difference in serious):
            hint = (
                f"the files of both sides store the same heads: correct {KEY} in the config.json"
                " that is wrong"
            )
        raise PairError(
            f"config.json changes the model: {'; '.join(map(str, serious[:5]))}{more}", hint
        )
    return found


def config_notes(found: Iterable[Difference]) -> list[str]:
    """A sentence for each difference that was let through for a reason of its own."""
    return [
        f"config.json: {difference}: {difference.reason}"
        for difference in found
        if difference.reason
    ]


def _check_names(
    base: Checkpoint, instruct: Checkpoint, aligned: Aligned, head: TiedHead | StoredTwice | None
) -> None:
    for side, own, other in (("base", base, instruct), ("instruct", instruct, base)):
        only = [
            n
            for n in own.tensors
            if n not in other.tensors and n not in aligned.apart and not (head and n == head.name)
        ]
        if only:
            raise PairError(
                f"{other.folder}: lacks {listed(only)}, which only {side} ({own.folder}) has",
                aligned.hint(only, own, other),
            )


def _in_order(
    base: Checkpoint, instruct: Checkpoint, head: TiedHead | StoredTwice | None, aligned: Aligned
) -> list[str]:
    """The tensors of the merge: instruct's, those that are made together one after another, then
    what base adds."""
    names = dict.fromkeys(name for first in instruct.tensors for name in base.made_with(first))
    if isinstance(head, TiedHead) and head.side == "instruct":
        names[head.name] = None
    if isinstance(head, StoredTwice):
        names.pop(head.name, None)
    added = [name for name, side in aligned.single.items() if side == "base"]
    return [name for name in [*names, *added] if name not in aligned.dropped]


def _check_tensor(name: str, base: TensorInfo, instruct: TensorInfo, extended: bool) -> None:
    where = f"tensor {quoted(name)}"
    if base.shape != instruct.shape and not extended:
        hint = "these are not base and instruct of one model"
        if base.shape[1:] == instruct.shape[1:] and base.shape and instruct.shape:
            hint = (
                "if these are vocabulary rows: each config.json must state its own number as"
                " vocab_size"
            )
        raise PairError(
            f"{where}: shape {list(base.shape)} in base and {list(instruct.shape)} in instruct",
            hint,
        )
    if base.dtype != instruct.dtype and not {base.dtype, instruct.dtype} <= FLOATS:
        merged = ", ".join(sorted(FLOATS))
        found = f"dtype {base.dtype} in base and {instruct.dtype} in instruct"
        raise PairError(
            f"{where}: {found}, expected equal dtypes or any of {merged}",
            "convert one side to the other's dtype",
        )


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    import torch

    dtype = first.dtype if first.dtype == second.dtype else torch.float32
    return torch.cat([first.to(dtype), second.to(dtype)])
