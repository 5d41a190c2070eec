"""Two checkpoints of one model, tensor by tensor, however each is cut into shards."""

from __future__ import annotations

import math
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.config import Difference, differences, ties
from pa_fast.checkpoint.names import counterpart, resave
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import FLOATS, TensorInfo, quoted, torch_dtype
from pa_fast.checkpoint.vocabulary import (
    KeptRows,
    check_vocabulary,
    extended,
    kept_rows,
    swapped_sides,
    vocabulary_sizes,
)
from pa_fast.errors import PairError, UsageError
from pa_fast.units import format_count

if TYPE_CHECKING:
    import torch
    from pa_kernels.scratch import Scratch


EXTRA_ROWS = ("instruct", "refuse")
ONE_SIDED = ("keep", "drop", "refuse")


@dataclass(frozen=True)
class PairOptions:
    """Options of every verb that pairs.

    Attributes:
        extra_rows: vocabulary rows that one side alone has are kept as they are (`instruct`) or not
            paired (`refuse`).
        one_sided: tensors that one side alone stores and that its model does not use, such as
            `mtp.*` or rotary tables, are kept as they are at every λ (`keep`), left out (`drop`) or
            not paired (`refuse`). None: those that the model class is known to ignore are kept,
            others refused.
        ignore_config: keys of config.json whose difference is accepted, with all that is nested
            below them.
        strip_prefix: what to remove from the beginning of tensor names of either side, such as
            `_orig_mod.`.
    """

    extra_rows: str = "instruct"
    one_sided: str | None = None
    ignore_config: tuple[str, ...] = ()
    strip_prefix: str = ""

    @classmethod
    def of(
        cls,
        extra_rows: str = "instruct",
        one_sided: str | None = None,
        ignore_config: Iterable[str] = (),
        strip_prefix: str = "",
    ) -> PairOptions:
        """The options as a caller gives them, checked.

        Raises:
            UsageError: no such policy.
        """
        if extra_rows not in EXTRA_ROWS:
            expected = f"expected {' or '.join(EXTRA_ROWS)}"
            raise UsageError(
                f"extra rows `{extra_rows}`: {expected}", "instruct keeps them, refuse does not"
            )
        if one_sided is not None and one_sided not in ONE_SIDED:
            expected = f"expected {', '.join(ONE_SIDED[:-1])} or {ONE_SIDED[-1]}"
            raise UsageError(
                f"one-sided tensors `{one_sided}`: {expected}", "keep writes them as they are"
            )
        if not isinstance(strip_prefix, str):
            raise UsageError(f"prefix {strip_prefix!r}: expected text", "such as _orig_mod.")
        keys = (ignore_config,) if isinstance(ignore_config, str) else tuple(ignore_config)
        return cls(extra_rows, one_sided, keys, strip_prefix)

    def document(self) -> dict[str, Any]:
        """The options as JSON values, those that are not as by default."""
        default = PairOptions()
        found = {
            name: value for name, value in vars(self).items() if value != getattr(default, name)
        }
        return {
            "extra_rows": self.extra_rows,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in found.items()},
        }

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> PairOptions:
        """The options that `document`, which may say more, holds.

        Raises:
            UsageError: no such policy.
            TypeError: a value is of another type.
        """
        found = {name: document[name] for name in vars(cls()) if name in document}
        if not all(isinstance(key, str) for key in found.get("ignore_config", ())):
            raise TypeError
        return cls.of(**found)

    def arguments(self) -> list[str]:
        """The options of the command line that say the same."""
        found = [] if self.extra_rows == "instruct" else ["--extra-rows", self.extra_rows]
        found += [] if self.one_sided is None else ["--one-sided", self.one_sided]
        found += [part for key in self.ignore_config for part in ("--ignore-config", key)]
        return found + (["--strip-prefix", self.strip_prefix] if self.strip_prefix else [])


DEFAULTS = PairOptions()


# --- tying
#
# An output head that one side ties to its embedding and the other stores: the merge has a head of
# its own.
#
# The tied side's head is its embedding, so W(λ) of the head is the merge of that embedding with the
# stored head, and the merged configuration says `tie_word_embeddings: false`. At the tied end the
# two are equal, and the model is that side's.

_HEADS = ("lm_head.weight", "embed_out.weight")
KEY = "tie_word_embeddings"
OTHER = {"base": "instruct", "instruct": "base"}


@dataclass(frozen=True)
class TiedHead:
    """The tensor `name`, which `side` does not store: there it is the tensor `embedding`."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        return f"{quoted(self.name)} is tied in {self.side} only: the merge has a head of its own"


@dataclass(frozen=True)
class StoredTwice:
    """The tensor `name`, which `side` alone stores, and which has the bits of the embedding that it
    is tied to."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        equal = (
            f"{quoted(self.name)}, which {self.side} alone stores, equals {quoted(self.embedding)}"
        )
        return f"{equal}: it is tied on both sides, and left out"


def is_head(name: str) -> bool:
    """Whether `name` is that of an output head."""
    return name.endswith(_HEADS)


def tied_head(
    base: Checkpoint, instruct: Checkpoint, apart: Container[str] = ()
) -> TiedHead | StoredTwice | None:
    """The head that one side alone stores, if that is the only tensor that the other lacks.

    A side that ties its head and stores it all the same has one of its own where the two weights
    differ, as in transformers.

    Args:
        apart: tensors that do not count.

    Cost: headers; reads head and embedding of a side that ties and stores it.

    Raises:
        PairError: the side without a head says that it has one, or its embedding cannot be told.
    """
    for side, lacking, having in (("base", base, instruct), ("instruct", instruct, base)):
        only = [
            name for name in having.tensors if name not in lacking.tensors and name not in apart
        ]
        if len(only) != 1 or not is_head(only[0]):
            continue
        (name,) = only
        if ties(lacking.config) is False:
            raise PairError(
                f"{lacking.folder}: lacks {quoted(name)}, and its config.json does not tie it,"
                " expected one of both",
                "complete the download, or correct its config.json",
            )
        if ties(having.config) is True:
            embedding = _embedding(having, having.tensors[name])
            if having.same_bits(name, embedding):
                return StoredTwice(name, OTHER[side], embedding)
        return TiedHead(name, side, _embedding(lacking, having.tensors[name]))
    return None


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the head said to be untied, wherever a loader may look."""
    made = {**config, KEY: False}
    for name, part in config.items():
        if isinstance(part, Mapping) and (KEY in part or name == "text_config"):
            made[name] = {**part, KEY: False}
    return made


def _embedding(checkpoint: Checkpoint, head: TensorInfo) -> str:
    """The one tensor with vocabulary rows as wide as `head`'s."""
    sizes = vocabulary_sizes(checkpoint.config)
    shaped = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    found = [
        name
        for name, (rows, width) in shaped.items()
        if rows in sizes and width == head.shape[-1] and name != head.name
    ]
    if len(found) != 1:
        listed = ", ".join(map(quoted, found[:3])) or "none"
        raise PairError(
            f"{checkpoint.folder}: its head {quoted(head.name)} is tied, expected one embedding of"
            f" shape {list(head.shape)}, found {listed}",
            "save this side with a head of its own (tie_word_embeddings: false)",
        )
    return found[0]


# --- alignment
#
# Both sides of a pair under one set of names, and what to say where that cannot be.

_ATTRIBUTES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = (*_ATTRIBUTES, "module.", "base_model.model.")
"""What torch.compile, FSDP, activation checkpointing, data parallelism and peft put before names.
The first three are names of attributes that no model has of its own."""


@dataclass(frozen=True)
class Aligned:
    """Two checkpoints under instruct's names.

    Attributes:
        single: name → side, of tensors that are kept though only that side has them.
        dropped: tensors of one side that are left out.
        kind: the model class whose tables were asked; None where transformers has none, or names
            agree.
        notes: what was paired otherwise than by its own name, kept or left out.
    """

    base: Checkpoint
    instruct: Checkpoint
    single: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    kind: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def apart(self) -> frozenset[str]:
        """Tensors that one side alone has, and that its model does not use."""
        return self.dropped | self.single.keys()

    def hint(self, only: Sequence[str], own: Checkpoint, other: Checkpoint) -> str:
        """What to do about the names `only`, which `other` lacks."""
        prefix = _prefix(own, other) or _prefix(other, own)
        if prefix:
            wrapped = own if _prefix(own, other) else other
            return (
                f"all names of {wrapped.folder} begin with {prefix}: --strip-prefix {prefix} pairs"
                " them without it"
            )
        if self.kind is None:
            return (
                "transformers has no class by which other names could be paired: use base and"
                " instruct of one model, saved alike"
            )
        it = "it" if len(only) == 1 else "them"
        mend = f"complete the download of {other.folder}, or {resave(other)}"
        return f"{self.kind} uses {it}: {mend}"


def align(base: Checkpoint, instruct: Checkpoint, policy: str | None) -> Aligned:
    """Both sides under instruct's names, by the conversions of transformers where their own names
    or shapes do not agree.

    Args:
        policy: what becomes of tensors that one side alone has and that have no place in the model,
            see `PairOptions`.

    Cost: microseconds while names and shapes agree, else see `counterpart`.

    Raises:
        PairError: such tensors are refused, or conversions do not fit.
    """
    if _agree(base, instruct):
        return Aligned(base, instruct, notes=tuple(_wrapped(instruct)))
    if _prefix(base, instruct) or _prefix(instruct, base):
        return Aligned(base, instruct)
    found = counterpart(base, instruct)
    if found is None:
        return Aligned(base, instruct)
    notes = list(found.notes)
    single: dict[str, str] = {}
    dropped: set[str] = set()
    for side, own, other in (("base", base, instruct), ("instruct", instruct, base)):
        for ignored in (True, False):
            names = [
                n
                for n, of in found.unused.items()
                if of == side and (n in found.ignored) == ignored
            ]
            if not names:
                continue
            it, are = ("it", "it is") if len(names) == 1 else ("them", "they are")
            why = f"{found.kind} {'ignores' if ignored else 'has no place for'} {it}"
            what = f"{listed(names)}: in {side} only, and {why}"
            kept = policy or ("keep" if ignored else "refuse")
            if kept == "refuse":
                prefix = _common_prefix(own, names)
                hint = f"--one-sided keep writes {it} as {are}, --one-sided drop leaves {it} out"
                if prefix:
                    hint = (
                        f"all names begin with {prefix}: --strip-prefix {prefix} pairs them"
                        " without it"
                    )
                lacks = f"lacks {listed(names)}, which only {side} ({own.folder}) has"
                raise PairError(f"{other.folder}: {lacks}, and {why}", hint)
            if kept == "keep":
                single |= dict.fromkeys(names, side)
                notes.append(f"{what}: kept as {are} at every λ (--one-sided drop leaves {it} out)")
            else:
                dropped |= set(names)
                notes.append(f"{what}: left out")
    return Aligned(found.base, instruct, single, frozenset(dropped), found.kind, tuple(notes))


def stripped(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """`checkpoint` with `prefix` removed where names begin with it; wherever it stands, if it is
    one that no model has itself.

    Raises:
        UsageError: two names become one.
    """
    if not prefix or not any(prefix in name for name in checkpoint.tensors):
        return checkpoint
    names: dict[str, str] = {}
    for key in checkpoint.tensors:
        name = key.replace(prefix, "") if is_attribute(prefix) else key.removeprefix(prefix)
        if name in names:
            both = f"{quoted(names[name])} and {quoted(key)}"
            raise UsageError(
                f"{checkpoint.folder}: {both} both become {quoted(name)} without {prefix}",
                "strip another prefix",
            )
        names[name] = key
    return checkpoint.renamed(names)


def is_attribute(prefix: str) -> bool:
    """Whether `prefix` is the name of an attribute that no model has of its own, so that it is
    removed wherever it stands."""
    return prefix in _ATTRIBUTES


def listed(names: Sequence[str]) -> str:
    """Up to three of `names`, and how many more there are."""
    return ", ".join(quoted(name) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _agree(base: Checkpoint, instruct: Checkpoint) -> bool:
    """Whether names and shapes agree, but for one head and vocabulary rows."""
    odd = base.tensors.keys() ^ instruct.tensors.keys()
    if len(odd) > 1 or not all(map(is_head, odd)):
        return False
    shaped = [
        n
        for n, info in instruct.tensors.items()
        if n not in odd and base.tensors[n].shape != info.shape
    ]
    rows = extended(base.tensors, instruct.tensors, base.config, instruct.config) if shaped else {}
    return all(name in rows for name in shaped)


def _prefix(own: Checkpoint, other: Checkpoint) -> str | None:
    """The wrapper prefix of all names of `own` but for which they are those of `other`."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in own.tensors) and not any(
            name.startswith(prefix) for name in other.tensors
        ):
            return prefix
    return None


def _common_prefix(own: Checkpoint, names: Sequence[str]) -> str | None:
    """The first part that all names of `own` have, if none of them has a place in the model."""
    if len(names) < len(own.tensors):
        return None
    first = names[0].partition(".")[0] + "."
    return first if all(name.startswith(first) for name in names) else None


def _wrapped(checkpoint: Checkpoint) -> Iterable[str]:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in checkpoint.tensors):
            yield (
                f"all names begin with {prefix}, under which transformers loads nothing:"
                f" --strip-prefix {prefix} removes it"
            )


# --- pairing
#
# Two checkpoints of one model, tensor by tensor, however each is cut into shards.


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
        [
            f"{format_count(len(fixed), 'tensor')} {'is' if len(fixed) == 1 else 'are'} not of a"
            " merged dtype and must be equal on both sides"
        ]
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
