"""Both sides of a pair under one set of names, and what to say where that cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pa_fast.checkpoint.counterpart import counterpart, resave
from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.rows import extended
from pa_fast.checkpoint.tying import is_head
from pa_fast.errors import PairError, UsageError

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
        return f"{self.kind} uses them: complete the download of {other.folder}, or {resave(other)}"


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
            why = f"{found.kind} {'ignores them' if ignored else 'has no place for them'}"
            what = f"{listed(names)}: in {side} only, and {why}"
            kept = policy or ("keep" if ignored else "refuse")
            if kept == "refuse":
                prefix = _common_prefix(own, names)
                hint = "--one-sided keep writes them as they are, --one-sided drop leaves them out"
                if prefix:
                    hint = (
                        f"all names begin with {prefix}: --strip-prefix {prefix} pairs them"
                        " without it"
                    )
                lacks = f"lacks {listed(names)}, which only {side} ({own.folder}) has"
                raise PairError(f"{other.folder}: {lacks}, and {why}", hint)
            if kept == "keep":
                single |= dict.fromkeys(names, side)
                notes.append(
                    f"{what}: kept as they are at every λ (--one-sided drop leaves them out)"
                )
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
