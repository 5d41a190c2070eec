"""Two checkpoints of one model, tensor by tensor, however each is cut into shards."""

from __future__ import annotations

import math
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.config import Difference, differences, is_tied, is_tied_in_config
from pa_fast.checkpoint.names import Skeleton, counterpart, resave
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import FLOATS, TensorInfo, quoted, torch_dtype
from pa_fast.checkpoint.vocabulary import (
    KeptRows,
    check_vocabulary,
    extended,
    kept_rows,
    mistaken_sides,
    vocabulary_sizes,
)
from pa_fast.errors import PairError, UsageError
from pa_fast.units import format_count

if TYPE_CHECKING:
    import torch
    from pa_kernels.cores import Scratch


EXTRA_ROWS = ("instruct", "refuse")
ONE_SIDED = ("keep", "drop", "refuse")


@dataclass(frozen=True)
class PairOptions:
    """Pairing options, shared by everything that pairs.

    Attributes:
        extra_rows: keep vocabulary rows that one side alone has as they are (`instruct`), or refuse
            such a pair (`refuse`).
        one_sided: keep tensors that one side alone stores and that its model does not use, such as
            `mtp.*` or rotary tables, as they are at every λ (`keep`), leave them out (`drop`), or
            refuse such a pair (`refuse`). None: keep those that the model class is known to ignore,
            refuse others.
        ignore_config: keys of config.json whose difference is accepted, with all that is nested
            below them.
        strip_prefix: prefixes to remove from the beginning of tensor names of either side, such as
            `_orig_mod.`.
    """

    extra_rows: str = "instruct"
    one_sided: str | None = None
    ignore_config: tuple[str, ...] = ()
    strip_prefix: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        extra_rows: str = "instruct",
        one_sided: str | None = None,
        ignore_config: Iterable[str] = (),
        strip_prefix: str | Iterable[str] = (),
    ) -> PairOptions:
        """Check the options as a caller gives them.

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
        prefixes = (strip_prefix,) if isinstance(strip_prefix, str) else tuple(strip_prefix)
        for prefix in prefixes:
            if not isinstance(prefix, str):
                raise UsageError(f"prefix {prefix!r}: expected text", "such as _orig_mod.")
        keys = (ignore_config,) if isinstance(ignore_config, str) else tuple(ignore_config)
        return cls(extra_rows, one_sided, keys, tuple(filter(None, prefixes)))

    def document(self) -> dict[str, Any]:
        """Return the options as JSON values; `extra_rows`, and others that are not at their
        defaults."""
        default = PairOptions()
        changed = {
            name: value for name, value in vars(self).items() if value != getattr(default, name)
        }
        return {
            "extra_rows": self.extra_rows,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()},
        }

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> PairOptions:
        """Return the options in `document`, which may hold more.

        Raises:
            UsageError: no such policy.
            TypeError: a value is of another type.
        """
        fields = {name: document[name] for name in vars(cls()) if name in document}
        if not all(isinstance(key, str) for key in fields.get("ignore_config", ())):
            raise TypeError
        return cls.of(**fields)

    def arguments(self) -> list[str]:
        """Return the command-line options that say the same."""
        options = [] if self.extra_rows == "instruct" else ["--extra-rows", self.extra_rows]
        options += [] if self.one_sided is None else ["--one-sided", self.one_sided]
        options += [part for key in self.ignore_config for part in ("--ignore-config", key)]
        return options + [part for one in self.strip_prefix for part in ("--strip-prefix", one)]


DEFAULTS = PairOptions()


# --- tying
#
# Where one side ties its output head to its embedding and the other stores a head, the merge has a
# head of its own: W(λ) of that embedding and the stored head. Its configuration says
# `tie_word_embeddings: false`. At the tied side's λ head and embedding are equal.

_HEADS = ("lm_head.weight", "embed_out.weight")
KEY = "tie_word_embeddings"
OTHER = {"base": "instruct", "instruct": "base"}


@dataclass(frozen=True)
class TiedHead:
    """The head `name`, which `side` does not store: on that side it is the tensor `embedding`."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        return f"{quoted(self.name)} is tied in {self.side} only: the merge has a head of its own"


@dataclass(frozen=True)
class StoredTwice:
    """The head `name`, stored by `side` alone or by `both`, with the bits of the embedding that it
    is tied to."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        stored = "both sides store" if self.side == "both" else f"{self.side} alone stores"
        return (
            f"{quoted(self.name)}, which {stored}, equals {quoted(self.embedding)}: it is tied on"
            " both sides, and left out"
        )


@dataclass(frozen=True)
class StoredApart:
    """The head `name`, which both sides store and tie in config.json, and which differs from the
    embedding on a side."""

    name: str

    def __str__(self) -> str:
        return (
            f"{quoted(self.name)}, which both sides store and config.json ties, differs from the"
            " embedding: the merge has a head of its own"
        )


Head = TiedHead | StoredTwice | StoredApart | None


def is_head(name: str) -> bool:
    """Return whether `name` is that of an output head."""
    return name.endswith(_HEADS)


def lone_head(
    base: Checkpoint, instruct: Checkpoint, apart: Container[str] = ()
) -> tuple[str, str] | None:
    """Return the head that one side alone stores and the side that lacks it, if that side lacks no
    other tensor.

    Args:
        apart: tensors to leave out of account.

    Raises:
        PairError: the side without a head says that it has one.
    """
    for side, lacking, having in (("base", base, instruct), ("instruct", instruct, base)):
        only = [n for n in having.tensors if n not in lacking.tensors and n not in apart]
        if len(only) != 1 or not is_head(only[0]):
            continue
        if is_tied(lacking.config) is False:
            raise PairError(
                f"{lacking.folder}: lacks {quoted(only[0])}, and its config.json does not tie it,"
                " expected one of both",
                "complete the download, or correct its config.json",
            )
        return only[0], side
    return None


def tied_head(base: Checkpoint, instruct: Checkpoint, apart: Container[str] = ()) -> Head:
    """Return the head that a side ties to its embedding, as the merge holds it; None if both sides
    store a head and do not tie it.

    A side that ties its head and also stores one has a head of its own if the two weights differ,
    as in transformers.

    Args:
        apart: tensors to leave out of account.

    Cost: headers; reads head and embedding of a side that both ties and stores its head.

    Raises:
        PairError: the side without a head says that it has one, or its embedding is ambiguous.
    """
    alone = lone_head(base, instruct, apart)
    if alone is not None:
        name, side = alone
        lacking, having = (base, instruct) if side == "base" else (instruct, base)
        if is_tied(having.config) is True:
            embedding = _embedding(having, having.tensors[name])
            if having.same_bits(name, embedding):
                return StoredTwice(name, OTHER[side], embedding)
        return TiedHead(name, side, _embedding(lacking, having.tensors[name]))
    heads = [name for name in instruct.tensors if is_head(name) and name in base.tensors]
    if len(heads) != 1 or not (
        is_tied_in_config(base.config) and is_tied_in_config(instruct.config)
    ):
        return None
    try:
        embeddings = [_embedding(side, side.tensors[heads[0]]) for side in (base, instruct)]
    except PairError:  # its embedding is ambiguous: the head stays one of its own
        return None
    if all(side.same_bits(heads[0], name) for side, name in zip((base, instruct), embeddings)):
        return StoredTwice(heads[0], "both", embeddings[1])
    return StoredApart(heads[0])


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with `tie_word_embeddings: false` wherever a loader may look for it."""
    changed = {**config, KEY: False}
    for name, part in config.items():
        if isinstance(part, Mapping) and (KEY in part or name == "text_config"):
            changed[name] = {**part, KEY: False}
    return changed


def _embedding(checkpoint: Checkpoint, head: TensorInfo) -> str:
    """Return the one tensor with vocabulary rows as wide as those of `head`."""
    sizes = vocabulary_sizes(checkpoint.config)
    shaped = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    embeddings = [
        name
        for name, (rows, width) in shaped.items()
        if rows in sizes and width == head.shape[-1] and name != head.name
    ]
    if len(embeddings) != 1:
        names = ", ".join(map(quoted, embeddings[:3])) or "none"
        raise PairError(
            f"{checkpoint.folder}: its head {quoted(head.name)} is tied, expected one embedding of"
            f" shape {list(head.shape)}, found {names}",
            "save this side with a head of its own (tie_word_embeddings: false)",
        )
    return embeddings[0]


# --- alignment

_ATTRIBUTES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPERS = (*_ATTRIBUTES, "module.", "base_model.model.")
"""Prefixes of names from torch.compile, FSDP, activation checkpointing, data parallelism and peft.
The first three are names of attributes that no model has of its own."""


@dataclass(frozen=True)
class Aligned:
    """Two checkpoints under instruct's names.

    Attributes:
        single: name → side, of tensors that are kept though only that side has them.
        dropped: tensors of one side that are left out.
        kind: the model class whose tables were used; None if transformers has no class, or names
            agree.
        notes: notes on tensors that were not paired by their own names, kept or left out.
    """

    base: Checkpoint
    instruct: Checkpoint
    single: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    kind: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def apart(self) -> frozenset[str]:
        """Tensors that one side alone has and that its model does not use."""
        return self.dropped | self.single.keys()

    def hint(self, only: Sequence[str], own: Checkpoint, other: Checkpoint) -> str:
        """Return the hint for the names `only`, which `other` lacks."""
        if self.kind is None:
            return (
                "transformers has no class by which other names could be paired: use base and"
                " instruct of one model, saved alike"
            )
        it = "it" if len(only) == 1 else "them"
        mend = f"complete the download of {other.folder}, or {resave(other)}"
        return f"{self.kind} uses {it}: {mend}"


def align(base: Checkpoint, instruct: Checkpoint, policy: str | None) -> Aligned:
    """Return both sides under instruct's names, converted as transformers does if names or shapes
    do not agree.

    Args:
        policy: of tensors that one side alone has and that its model does not use: `one_sided` of
            `PairOptions`.

    Cost: microseconds if names and shapes agree, else see `counterpart`.

    Raises:
        PairError: such tensors are refused, or conversions do not fit.
    """
    _check_prefixes(base, instruct)
    if _agree(base, instruct):
        return Aligned(base, instruct, notes=tuple(_wrapped(instruct)))
    mapped = counterpart(base, instruct)
    if mapped is None:
        return Aligned(base, instruct)
    notes = list(mapped.notes)
    single: dict[str, str] = {}
    dropped: set[str] = set()
    for side, own, other in (("base", base, instruct), ("instruct", instruct, base)):
        for ignored in (True, False):
            names = [
                n
                for n, of in mapped.unused.items()
                if of == side and (n in mapped.ignored) == ignored
            ]
            if not names:
                continue
            it, are = ("it", "it is") if len(names) == 1 else ("them", "they are")
            reason = f"{mapped.kind} {'ignores' if ignored else 'has no place for'} {it}"
            what = f"{listed_names(names)}: in {side} only, and {reason}"
            kept = policy or ("keep" if ignored else "refuse")
            if kept == "refuse":
                prefix = _common_prefix(own, names)
                hint = f"--one-sided keep writes {it} as {are}, --one-sided drop leaves {it} out"
                if prefix:
                    hint = (
                        f"all names begin with {prefix}: --strip-prefix {prefix} pairs them"
                        " without it"
                    )
                lacks = f"lacks {listed_names(names)}, which only {side} ({own.folder}) has"
                raise PairError(f"{other.folder}: {lacks}, and {reason}", hint)
            if kept == "keep":
                single |= dict.fromkeys(names, side)
                notes.append(f"{what}: kept as {are} at every λ (--one-sided drop leaves {it} out)")
            else:
                dropped |= set(names)
                notes.append(f"{what}: left out")
    return Aligned(mapped.base, instruct, single, frozenset(dropped), mapped.kind, tuple(notes))


def stripped(checkpoint: Checkpoint, prefixes: Iterable[str]) -> Checkpoint:
    """Return `checkpoint` with each of `prefixes` removed from the beginning of names, or from
    anywhere in them if no model itself has such an attribute.

    Raises:
        UsageError: two names would become one, or a name would begin with a dot.
    """
    names = {key: key for key in checkpoint.tensors}
    for prefix in prefixes:
        named = [name for name in names if name.startswith(prefix)]
        if named and all(name.startswith(f"{prefix}.") for name in named):
            raise UsageError(
                f"prefix {quoted(prefix)}: {quoted(named[0])} would begin with a dot",
                f"write it with the dot: --strip-prefix {prefix}.",
            )
        shorter: dict[str, str] = {}
        for name, key in names.items():
            new = name.replace(prefix, "") if is_attribute(prefix) else name.removeprefix(prefix)
            if new in shorter:
                both = f"{quoted(shorter[new])} and {quoted(key)}"
                raise UsageError(
                    f"{checkpoint.folder}: {both} both become {quoted(new)} without {prefix}",
                    "strip another prefix",
                )
            shorter[new] = key
        names = shorter
    return checkpoint if all(a == b for a, b in names.items()) else checkpoint.renamed(names)


def is_attribute(prefix: str) -> bool:
    """Return whether `prefix` is the name of an attribute that no model has of its own, so that it
    is removed anywhere in a name."""
    return prefix in _ATTRIBUTES


def listed_names(names: Sequence[str]) -> str:
    """Return up to three of `names`, and the number of the others."""
    return ", ".join(quoted(name) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _agree(base: Checkpoint, instruct: Checkpoint) -> bool:
    """Return whether names and shapes agree, apart from one head and vocabulary rows."""
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


def _prefix(checkpoint: Checkpoint) -> str | None:
    """Return the wrapper prefix of all names of `checkpoint`; None if there is none."""
    for prefix in _WRAPPERS:
        if checkpoint.tensors and all(name.startswith(prefix) for name in checkpoint.tensors):
            return prefix
    return None


def _check_prefixes(base: Checkpoint, instruct: Checkpoint) -> None:
    """Refuse sides whose names have wrapper prefixes, if they do not pair so or transformers loads
    nothing under such names.

    Raises:
        PairError: naming the prefixes.
    """
    prefixes = _prefix(base), _prefix(instruct)
    if not any(prefixes):
        return
    if prefixes[0] == prefixes[1]:
        skeleton = Skeleton.of(instruct.config, base.config)
        if skeleton is None or skeleton.trace(instruct.tensors).placed:
            return  # of a class that transformers does not know, the prefix may be its own
        where = "both sides"
        reason = f"transformers loads nothing into {type(skeleton.model).__name__} under such names"
    else:
        where = " and ".join(
            str(side.folder) for side, prefix in zip((base, instruct), prefixes) if prefix
        )
        reason = "the other side has no such names" if None in prefixes else "which differ"
    options = dict.fromkeys(f"--strip-prefix {prefix}" for prefix in prefixes if prefix)
    named = " and ".join(dict.fromkeys(filter(None, prefixes)))
    raise PairError(
        f"all names of {where} begin with {named}: {reason}",
        f"{' '.join(options)} pairs them without",
    )


def _common_prefix(own: Checkpoint, names: Sequence[str]) -> str | None:
    """Return the first part of all names of `own`, if none of them has a use in the model."""
    if len(names) < len(own.tensors):
        return None
    first = names[0].partition(".")[0] + "."
    return first if all(name.startswith(first) for name in names) else None


def _wrapped(checkpoint: Checkpoint) -> Iterable[str]:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in checkpoint.tensors):
            yield (f"all names begin with {prefix}: --strip-prefix {prefix} removes it")


# --- pairing


@dataclass(frozen=True)
class Pair:
    """A base and an instruct checkpoint that describe the same model.

    Attributes:
        base: base under the names and in the layout of instruct.
        names: every tensor of the merge, in instruct's order on disk; those that one conversion
            makes are together.
        shapes: their shapes.
        differences: configuration keys that differ, all of them harmless or ignored on request.
        notes: sentences for the user.
        tied: the head that one side alone stores.
        kept: vocabulary rows that one side alone has.
        single: name → side, of tensors that only that side has and its model does not use.
        is_untied: whether the merge has a head of its own though instruct's config.json ties it.
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
        """Return whether tensor `name` follows λ. Of the others, those of both sides (integers,
        bool, F64) must be equal."""
        return name not in self.single and self.stored("instruct", name).dtype in FLOATS

    def count(self, name: str) -> int:
        """Return the number of elements of the merged tensor `name`."""
        return math.prod(self.shapes[name])

    def checkpoint(self, side: str) -> Checkpoint:
        """Return `base` or `instruct`."""
        return self.base if side == "base" else self.instruct

    def stored(self, side: str, name: str) -> TensorInfo:
        """Return the tensor of `side` that tensor `name` of the merge is made of: the embedding if
        `side` ties its head.

        For a tensor that one side alone has, return that side's.
        """
        tensors = self.checkpoint(self.single.get(name, side)).tensors
        return tensors[self.tied.embedding if self.tied and name not in tensors else name]

    def chunk(
        self, side: str, name: str, start: int, stop: int, scratch: Scratch | None = None
    ) -> torch.Tensor:
        """Read elements `start` to `stop` of the flattened tensor `name` as `side` has it, [stop -
        start].

        Vocabulary rows that `side` lacks are read from the other side, so that they are the same at
        every λ.

        Args:
            scratch: memory to read into, under the key `side`; None for new memory.

        Numerics: exact; a chunk with rows of both sides is of a dtype that holds both.
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
        """Return the part of `chunk` that `side` itself stores as tensor `name`: nothing of a tied
        head, and no row that it lacks.

        Args:
            start: elements of the tensor before `chunk`.

        Cost: reads again only if the chunk has rows of two dtypes.
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
        """Raise DataError if a file that feeds `name` changed since its header was read. Call it
        after reading."""
        for side in ("base", "instruct"):
            self.checkpoint(self.single.get(name, side)).check_unchanged(
                self.stored(side, name).name
            )

    def release(self, name: str) -> None:
        """Free what is held in memory to read `name`. Call it after reading a part of the
        tensor."""
        self.base.release(name)


def pair(base: Checkpoint, instruct: Checkpoint, options: PairOptions = DEFAULTS) -> Pair:
    """Pair two open checkpoints, from headers, config.json and tokenizer.json.

    Tensors are paired by name if the names agree; else by the tensors of the model class that
    transformers makes of them.

    Raises:
        PairError: the configurations describe different functions, a name is on one side only,
            shapes differ, a dtype cannot be interpolated, or token ids mean different tokens; each
            message names the key or tensor and both values.
        CheckpointError: a tokenizer.json is malformed.
    """
    base, instruct = stripped(base, options.strip_prefix), stripped(instruct, options.strip_prefix)
    aligned = align(base, instruct, options.one_sided)
    base, instruct = aligned.base, aligned.instruct
    head = tied_head(base, instruct, aligned.apart)
    one_tied = head if isinstance(head, TiedHead) else None
    own_head = one_tied is not None or any(
        is_head(name) and name in base.tensors for name in instruct.tensors
    )
    differing = check_configs(base, instruct, tying=not own_head, ignored=options.ignore_config)
    check_names(aligned, () if head is None else (head.name,))
    is_untied = isinstance(head, (TiedHead, StoredApart)) or (
        own_head and any(one.key.split(".")[-1] == KEY for one in differing)
    )
    names = _in_order(base, instruct, head, aligned)
    draft = Pair(
        base,
        instruct,
        tuple(names),
        {},
        tuple(differing),
        (),
        one_tied,
        (),
        aligned.single,
        is_untied,
    )
    sides = {
        side: {name: draft.stored(side, name) for name in names} for side in ("base", "instruct")
    }
    rows = extended(sides["base"], sides["instruct"], base.config, instruct.config)
    shapes = {}
    for name in names:
        b, i = sides["base"][name], sides["instruct"][name]
        _check_tensor(name, b, i, name in rows)
        shapes[name] = max(b.shape, i.shape)
    fixed = [name for name in names if not draft.is_lerped(name) and name not in draft.single]
    notes = mistaken_sides(base, instruct)
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
    notes += config_notes(differing)
    return replace(draft, shapes=shapes, notes=tuple(notes), kept=kept_rows(rows))


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")


def check_configs(
    base: Checkpoint, instruct: Checkpoint, *, tying: bool = True, ignored: Iterable[str] = ()
) -> list[Difference]:
    """Return the differences between two config.json that do not change the model's function, or
    that the user accepts.

    Args:
        tying: whether a head that is tied on one side only makes another function.
        ignored: keys whose difference is accepted.

    Raises:
        PairError: a key that changes the function differs; the message names it and both values.
    """
    differing = differences(
        base.config, instruct.config, frozenset() if tying else frozenset({KEY}), ignored
    )
    serious = [difference for difference in differing if not difference.is_accepted]
    if serious:
        more = f" (and {len(serious) - 5} more keys)" if len(serious) > 5 else ""
        keys = " ".join(
            f"--ignore-config {shlex.quote(difference.key)}" for difference in serious[:5]
        )
        if all(difference.key.endswith(KEY) for difference in serious):
            hint = (
                f"the files of both sides store the same heads: correct {KEY} in the config.json"
                " that is wrong"
            )
        elif any(difference.key.rpartition(".")[2] in _SIZES for difference in serious):
            hint = "these are two models: name base and instruct of one"
        else:
            hint = (
                "use base and instruct of one model; where a difference does not matter, accept it:"
                f" {keys}"
            )
        raise PairError(
            f"config.json changes the model: {'; '.join(map(str, serious[:5]))}{more}", hint
        )
    return differing


def config_notes(differing: Iterable[Difference]) -> list[str]:
    """Return a sentence for each difference that was accepted for a stated reason."""
    return [
        f"config.json: {difference}: {difference.reason}"
        for difference in differing
        if difference.reason
    ]


def sides_of_model(
    base: Checkpoint, instruct: Checkpoint, options: PairOptions
) -> tuple[Checkpoint, Checkpoint, Aligned, list[Difference]]:
    """Check two open checkpoints that a loader reads as one model, to pair the tensors of models
    instead of files.

    Returns: both without prefixes, their alignment, and the accepted differences of config.json.

    Raises:
        PairError: as `pair`, but for shapes, dtypes and token ids.
    """
    differing = check_configs(base, instruct, tying=False, ignored=options.ignore_config)
    base, instruct = stripped(base, options.strip_prefix), stripped(instruct, options.strip_prefix)
    aligned = align(base, instruct, options.one_sided)
    head = lone_head(aligned.base, aligned.instruct, aligned.apart)
    check_names(aligned, () if head is None else head[:1])
    return base, instruct, aligned, differing


def check_names(aligned: Aligned, excused: Container[str] = ()) -> None:
    """Refuse two sides if one has a tensor that the other lacks.

    Args:
        excused: names that one side may lack: its head, if that is tied.

    Raises:
        PairError: naming the tensors and the folder that lacks them.
    """
    base, instruct = aligned.base, aligned.instruct
    for side, own, other in (("base", base, instruct), ("instruct", instruct, base)):
        only = [
            n
            for n in own.tensors
            if n not in other.tensors and n not in aligned.apart and n not in excused
        ]
        if only:
            raise PairError(
                f"{other.folder}: lacks {listed_names(only)}, which only {side} ({own.folder}) has",
                aligned.hint(only, own, other),
            )


def _in_order(base: Checkpoint, instruct: Checkpoint, head: Head, aligned: Aligned) -> list[str]:
    """Return the tensors of the merge: instruct's, with those that are made together in a row, then
    those that base adds."""
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
        actual = f"dtype {base.dtype} in base and {instruct.dtype} in instruct"
        raise PairError(
            f"{where}: {actual}, expected equal dtypes or any of {merged}",
            "convert one side to the other's dtype",
        )


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    import torch

    dtype = first.dtype if first.dtype == second.dtype else torch.float32
    return torch.cat([first.to(dtype), second.to(dtype)])
