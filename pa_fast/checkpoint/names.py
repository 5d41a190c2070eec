"""Names that checkpoint tensors have in their model class, which is built without weights.

transformers renames, stacks, splits and transposes tensors while it loads. This module reads its
conversion tables and has no table of architectures.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.config import model_class_name
from pa_fast.checkpoint.reader import Checkpoint, Conversion, InMemory, View
from pa_fast.checkpoint.safetensors import DTYPE_BITS, TensorInfo, quoted, torch_dtype
from pa_fast.errors import PairError

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Placed:
    """A checkpoint tensor and the model tensor that it becomes.

    Attributes:
        key: name in the checkpoint.
        target: name of the model tensor, or of the first one if `key` is split into several.
        pattern: pattern of the conversion that makes `target`; None if `key` is only renamed.
        order: position among the tensors of this `target` and `pattern`.
    """

    key: str
    target: str
    pattern: str | None
    order: int


@dataclass(frozen=True)
class Traced:
    """Checkpoint tensors by the model tensor that they become.

    Attributes:
        placed: model name → the checkpoint tensors that make it, in transformers' order.
        unplaced: names of checkpoint tensors that the model has no tensor for.
    """

    placed: Mapping[str, Sequence[Placed]]
    unplaced: tuple[str, ...]


class Skeleton:
    """A transformers model on the meta device, with its conversion tables.

    Attributes:
        model: the model.
        tensors: its parameters and persistent buffers by name; tied ones have several names.
    """

    def __init__(self, model: Any):
        self.model = model
        self.tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)

    @classmethod
    def of(cls, config: Mapping[str, Any], other: Mapping[str, Any]) -> Skeleton | None:
        """Return the model that `config` describes; None if transformers has no class for it or the
        class refuses the configuration.

        Args:
            other: configuration that is searched for the class name if `config` has none.
        """
        import torch
        import transformers
        from transformers import initialization
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        named = model_class_name(config, other)
        safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
        try:
            configuration = CONFIG_MAPPING[config["model_type"]].from_dict(
                copy.deepcopy(dict(config))
            )
            with torch.device("meta"), initialization.no_init_weights(), safe(), _quiet():
                if named is None:
                    return cls(
                        transformers.AutoModelForCausalLM.from_config(
                            configuration, trust_remote_code=False
                        )
                    )
                kind = getattr(transformers, named)
                # a configuration may name anything that transformers has, and only a model's class
                # is to be called
                return (
                    cls(kind(configuration))
                    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
                    else None
                )
        except Exception:
            # an unknown class or a malformed configuration: names are then compared as they are
            return None

    def trace(self, keys: Iterable[str]) -> Traced:
        """Return the model tensor that each of the checkpoint's `keys` becomes."""
        from transformers.core_model_loading import dot_natural_key

        renamings, converters = self._rules()
        placed: dict[str, list[Placed]] = {}
        unplaced = []
        # the order of transformers: a rule may depend on what it saw before, and stacks are in this
        # order
        for key in sorted(dict.fromkeys(keys), key=dot_natural_key):
            name, pattern = self._renamed(key, renamings, converters)
            if name not in self.tensors:
                unplaced.append(key)
                continue
            same = placed.setdefault(name, [])
            same.append(Placed(key, name, pattern, sum(one.pattern == pattern for one in same)))
        return Traced(placed, tuple(unplaced))

    def is_ignored(self, name: str) -> bool:
        """Return True if the model class lists `name` as a checkpoint tensor that it does not
        use."""
        renamed = self._renamed(name, *self._rules())[0]
        return any(re.search(pattern, renamed) for pattern in self._ignored)

    @functools.cached_property
    def converters(self) -> dict[str, Any]:
        """Conversions of the model class, by the pattern of the names that they take."""
        return {pattern: one for one in self._rules()[1] for pattern in one.source_patterns}

    def convert(
        self, converter: Any, target: str, parts: Iterable[tuple[str, str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that `converter` makes of `parts` (name, pattern, tensor), by name,
        `target` first."""
        own = copy.deepcopy(converter)
        for name, pattern, tensor in parts:
            own.add_tensor(target, name, pattern, tensor)
        tensors = own.convert(target, model=self.model, config=self.model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in tensors.items()
        }

    @functools.cached_property
    def _ignored(self) -> set[str]:
        patterns = set(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        buffers = [buffer for buffer, _ in self.model.named_buffers()]
        # transformers adds these two by itself, for models that compute such buffers
        if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(buffer.endswith("position_ids") for buffer in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return patterns

    def _renamed(
        self, key: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, self.tensors)
        if name not in self.tensors and key in self.tensors:
            return key, None
        return name, pattern

    def _rules(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(self.model)
        return (
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            [rule for rule in rules if isinstance(rule, WeightConverter)],
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' advice on stderr about a model that is never run."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# --- counterpart
#
# Both sides are traced through transformers' own tables to the tensors of the model class. Those
# that become one model tensor belong together. Where one side stacks, splits or transposes, base's
# are converted to the model's layout and back to instruct's, one group at a time.


@dataclass(frozen=True)
class Counterpart:
    """Base checkpoint in the layout of the instruct checkpoint.

    Attributes:
        base: base under instruct's names; tensors that instruct lacks have their names in the
            model.
        unused: name → side, of tensors that only one side has and that the model does not use.
        ignored: those of `unused` that the model class lists as ignored.
        kind: the model class.
        notes: notes on tensors that were not paired by their own names.
    """

    base: Checkpoint
    unused: Mapping[str, str]
    ignored: frozenset[str]
    kind: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Group:
    """Checkpoint tensors that together become the model tensors `makes`. `is_converted` is False
    for one tensor that is only renamed."""

    target: str
    parts: tuple[Placed, ...]
    makes: dict[str, torch.Tensor]

    @property
    def is_converted(self) -> bool:
        return self.parts[0].pattern is not None

    @property
    def positions(self) -> set[tuple[str | None, int]]:
        return {(part.pattern, part.order) for part in self.parts}


class _Side:
    """One checkpoint, traced through its model class."""

    def __init__(self, side: str, checkpoint: Checkpoint, skeleton: Skeleton):
        self.side = side
        self.checkpoint = checkpoint
        self.skeleton = skeleton
        traced = skeleton.trace(checkpoint.tensors)
        self.unplaced = traced.unplaced
        self.groups = [self._group(target, tuple(parts)) for target, parts in traced.placed.items()]
        self.owner = {name: group for group in self.groups for name in group.makes}

    def forward(self, group: _Group, tensors: Tensors) -> Tensors:
        """Return the model tensors that `group` makes of checkpoint `tensors`."""
        if not group.is_converted:
            return {group.target: tensors[group.parts[0].key]}
        converter = self.skeleton.converters[str(group.parts[0].pattern)]
        return self.skeleton.convert(
            converter,
            group.target,
            [(part.key, str(part.pattern), tensors[part.key]) for part in group.parts],
        )

    def backward(self, group: _Group, tensors: Tensors) -> Tensors:
        """Return the checkpoint tensors from which `forward` makes `tensors`, bit for bit.

        Raises:
            PairError: no checkpoint tensors do.
        """
        if not group.is_converted:
            return {group.parts[0].key: tensors[group.target]}
        for undo in (self._reversed, self._scattered):
            try:
                candidate = undo(group, tensors)
                shapes = {name: tuple(tensor.shape) for name, tensor in candidate.items()}
                if shapes == {
                    part.key: self.checkpoint.tensors[part.key].shape for part in group.parts
                } and _equal(self.forward(group, candidate), tensors):
                    return candidate
            except (
                ValueError,
                KeyError,
                RuntimeError,
                IndexError,
                TypeError,
                AttributeError,
                StopIteration,
            ):
                continue
        raise PairError(
            f"transformers cannot lay out {quoted(group.target)} as {self.checkpoint.folder} has"
            f" it: as {quoted(group.parts[0].key)} and {len(group.parts) - 1} more",
            resave(self.checkpoint),
        )

    def _reversed(self, group: _Group, tensors: Tensors) -> Tensors:
        """Undo the conversion by transformers' own reverse of it."""
        converter = self.skeleton.converters[str(group.parts[0].pattern)]
        back = converter.reverse_transform()
        renamed = {name: back.rename_source_key(name) for name in tensors}
        pieces = self.skeleton.convert(
            back,
            next(iter(renamed.values()))[0],
            [(name, str(renamed[name][1]), tensors[name]) for name in tensors],
        )
        traced = self.skeleton.trace(pieces)
        keys = {(part.pattern, part.order): part.key for part in group.parts}
        return {
            keys[part.pattern, part.order]: pieces[part.key] for part in traced.placed[group.target]
        }

    def _scattered(self, group: _Group, tensors: Tensors) -> Tensors:
        """Undo the conversion by tracing where each element goes, for conversions whose reverse
        does not know the layout of the files."""
        import torch

        infos = [self.checkpoint.tensors[part.key] for part in group.parts]
        ids, first = {}, 0
        for info in infos:
            ids[info.name] = torch.arange(first, first + info.count).view(info.shape)
            first += info.count
        positions = self.forward(group, ids)
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        flat = torch.empty(first, dtype=dtype)
        for name, tensor in tensors.items():
            flat[positions[name].reshape(-1)] = tensor.reshape(-1).to(dtype)
        parts = flat.split([info.count for info in infos])
        return {info.name: part.view(info.shape) for info, part in zip(infos, parts)}

    def _group(self, target: str, parts: tuple[Placed, ...]) -> _Group:
        import torch

        infos = [self.checkpoint.tensors[part.key] for part in parts]
        metas = {
            i.name: torch.empty(i.shape, dtype=torch_dtype(i.dtype), device="meta") for i in infos
        }
        group = _Group(target, parts, {target: metas[parts[0].key]})
        if len({part.pattern is None for part in parts}) > 1 or (
            not group.is_converted and len(parts) > 1
        ):
            names = " and ".join(quoted(part.key) for part in parts[:2])
            raise PairError(
                f"{self.checkpoint.folder}: {names} both become {quoted(target)}",
                resave(self.checkpoint),
            )
        if not group.is_converted:
            return group
        try:
            return _Group(target, parts, self.forward(group, metas))
        except Exception as error:  # a table of transformers that does not fit these shapes
            raise PairError(
                f"{self.checkpoint.folder}: transformers cannot make {quoted(target)} of"
                f" {quoted(parts[0].key)} and {len(parts) - 1} more: {error}",
                "complete the download: a tensor of the group is missing, or of another shape",
            ) from error


def counterpart(base: Checkpoint, instruct: Checkpoint) -> Counterpart | None:
    """Return base as instruct is laid out; None if transformers does not know the model class.

    Cost: headers, and the model on the meta device: seconds for the largest. The conversions cost
    memory when they are read, see `Conversion`.

    Raises:
        PairError: two tensors become one, or a conversion fits the files of one side only.
    """
    skeletons = Skeleton.of(base.config, instruct.config), Skeleton.of(instruct.config, base.config)
    if skeletons[0] is None or skeletons[1] is None:
        return None
    base_side = _Side("base", base, skeletons[0])
    instruct_side = _Side("instruct", instruct, skeletons[1])
    names: dict[str, str] = {}
    conversions: dict[TensorInfo, Conversion] = {}
    alone = []
    for ours, theirs in _components(base_side, instruct_side):
        if not ours:
            continue
        if not theirs:
            alone += ours
            continue
        pairs = _same_pieces(ours, theirs, base, instruct)
        if pairs is not None:
            names |= pairs
        else:
            conversions |= _conversion(base_side, ours, instruct_side, theirs)
    renamed = {name: key for name, key in names.items() if name != key}
    for group in alone:
        single = not group.is_converted and renamed
        names |= {(group.target if single else part.key): part.key for part in group.parts}
    both = set(base_side.unplaced) & set(instruct_side.unplaced)
    names |= {name: name for name in base_side.unplaced}
    unused = {name: "base" for name in base_side.unplaced if name not in both}
    unused |= {name: "instruct" for name in instruct_side.unplaced if name not in both}
    ignored = frozenset(
        name
        for name in unused
        if base_side.skeleton.is_ignored(name) or instruct_side.skeleton.is_ignored(name)
    )
    kind = type(instruct_side.skeleton.model).__name__
    return Counterpart(
        View(base, names, conversions),
        unused,
        ignored,
        kind,
        tuple(_notes(renamed, conversions, kind)),
    )


def undone(checkpoint: Checkpoint, skeleton: Skeleton, tensors: InMemory) -> list[Conversion]:
    """Return the tensors of `checkpoint` that transformers stacks, splits or transposes, computed
    from the model's `tensors`."""
    side = _Side("instruct", checkpoint, skeleton)
    conversions = []
    for group in (group for group in side.groups if group.is_converted):
        infos = [checkpoint.tensors[part.key] for part in group.parts]
        conversions.append(
            Conversion(tensors, list(group.makes), infos, functools.partial(side.backward, group))
        )
    return conversions


def resave(checkpoint: Checkpoint) -> str:
    """Return the hint with the call that writes a checkpoint in the layout of its model class."""
    kind = (checkpoint.config.get("architectures") or ["AutoModelForCausalLM"])[0]
    return (
        f"save both sides anew with one transformers: {kind}.from_pretrained(DIR, dtype='auto')"
        ".save_pretrained(NEW, save_original_format=False)"
    )


def _components(
    base_side: _Side, instruct_side: _Side
) -> Iterator[tuple[list[_Group], list[_Group]]]:
    """Yield the groups of both sides that share model tensors, directly or through other
    groups."""
    done: set[str] = set()
    for start in [*instruct_side.owner, *base_side.owner]:
        if start in done:
            continue
        names, seen = [start], {start}
        ours: dict[str, _Group] = {}
        theirs: dict[str, _Group] = {}
        while names:
            name = names.pop()
            for side, groups in ((base_side, ours), (instruct_side, theirs)):
                group = side.owner.get(name)
                if group is not None and group.target not in groups:
                    groups[group.target] = group
                    names += [more for more in group.makes if more not in seen]
                    seen |= group.makes.keys()
        done |= seen
        yield list(ours.values()), list(theirs.values())


def _same_pieces(
    ours: list[_Group], theirs: list[_Group], base: Checkpoint, instruct: Checkpoint
) -> dict[str, str] | None:
    """Return base's name by instruct's if both sides store the same pieces; None if one must be
    converted."""
    if len(ours) != 1 or len(theirs) != 1 or ours[0].positions != theirs[0].positions:
        return None
    keys = {(part.pattern, part.order): part.key for part in ours[0].parts}
    pairs = {part.key: keys[part.pattern, part.order] for part in theirs[0].parts}
    if ours[0].is_converted and any(
        base.tensors[b].shape != instruct.tensors[i].shape for i, b in pairs.items()
    ):
        return None
    return pairs


def _conversion(
    base_side: _Side, ours: list[_Group], instruct_side: _Side, theirs: list[_Group]
) -> dict[TensorInfo, Conversion]:
    """Convert base's groups `ours` to the layout of instruct's groups `theirs`.

    Raises:
        PairError: one side has model tensors that the other lacks, or of another shape.
    """
    from_base = {name: meta for group in ours for name, meta in group.makes.items()}
    wanted = {name: meta for group in theirs for name, meta in group.makes.items()}
    for name in [*wanted, *from_base]:
        shapes = [
            list(side[name].shape) if name in side else "no tensor" for side in (from_base, wanted)
        ]
        if shapes[0] != shapes[1]:
            raise PairError(
                f"tensor {quoted(name)} of the model: {shapes[0]} from"
                f" {quoted(ours[0].parts[0].key)} of base and {shapes[1]} from"
                f" {quoted(theirs[0].parts[0].key)} of instruct",
                "use base and instruct of one model",
            )

    def make(tensors: Tensors) -> Tensors:
        model: Tensors = {}
        for group in ours:
            model |= base_side.forward(group, tensors)
        converted: Tensors = {}
        for group in theirs:
            converted |= instruct_side.backward(group, {name: model[name] for name in group.makes})
        return converted

    sources = [part.key for group in ours for part in group.parts]
    file = base_side.checkpoint.tensors[sources[0]].file
    infos = []
    for group in theirs:
        dtype = _safetensors_dtype(base_side, ours, group)
        for part in group.parts:
            own = instruct_side.checkpoint.tensors[part.key]
            infos.append(
                TensorInfo(part.key, dtype, own.shape, file, 0, own.count * DTYPE_BITS[dtype] // 8)
            )
    conversion = Conversion(base_side.checkpoint, sources, infos, make)
    return dict.fromkeys(infos, conversion)


def _safetensors_dtype(base_side: _Side, ours: Sequence[_Group], group: _Group) -> str:
    """Return the dtype that base's tensors have once they make the model tensors of `group`."""
    import torch

    metas = {name: meta for one in ours for name, meta in one.makes.items() if name in group.makes}
    dtype = functools.reduce(torch.promote_types, (meta.dtype for meta in metas.values()))
    known = {
        info.dtype
        for one in ours
        for part in one.parts
        for info in [base_side.checkpoint.tensors[part.key]]
    } | {"F32"}
    return next(name for name in sorted(known) if torch_dtype(name) == dtype)


def _equal(a: Tensors, b: Tensors) -> bool:
    """Return whether two sets of tensors have the same bits."""
    import torch

    return a.keys() == b.keys() and all(
        a[name].dtype == tensor.dtype
        and a[name].shape == tensor.shape
        and torch.equal(
            a[name].contiguous().view(-1).view(torch.uint8),
            tensor.contiguous().view(-1).view(torch.uint8),
        )
        for name, tensor in b.items()
    )


def _notes(
    renamed: Mapping[str, str], conversions: Mapping[TensorInfo, Conversion], kind: str
) -> Iterable[str]:
    if renamed:
        name, key = next(iter(renamed.items()))
        yield (
            f"{len(renamed)} tensors have other names in base, such as {quoted(key)} for"
            f" {quoted(name)} of instruct: paired by their places in {kind}"
        )
    if conversions:
        info, one = next(iter(conversions.items()))
        more = f" and {len(one.sources) - 1} more" if len(one.sources) > 1 else ""
        yield (
            f"{len(conversions)} tensors are laid out otherwise in base: made as transformers"
            f" converts them, such as {quoted(info.name)} of {quoted(one.sources[0])}{more}"
        )
