"""Which tensors in the files of one side each tensor of its model is made of, and the proof that
transformers made it of these and no others.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.content import over_tensors
from pa_fast.checkpoint.layout import chunk_sum
from pa_fast.checkpoint.names import Skeleton
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import TensorInfo, quoted, torch_dtype
from pa_fast.engines import layout
from pa_fast.engines.ranks import ALONE, Alone, Ranks
from pa_fast.errors import EngineError, UsageError
from pa_fast.live.memory import FileMaps

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Traced:
    """Where the tensors of a model come from.

    Attributes:
        names: live name → checkpoint names that it is made of, in the order of the checkpoint.
        converted: live names whose elements do not lie as in a checkpoint tensor: fused, split or
            transposed.
    """

    names: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]

    def check_elementwise(self, live: Mapping[str, object]) -> None:
        """Refuse live tensors, of which a tied one has several names, whose elements do not lie as
        in the checkpoint: noise goes by their places there.

        Raises:
            UsageError: a tensor is converted, or comes from nowhere.
        """
        known = {id(tensor) for name, tensor in live.items() if name in self.names}
        for name, tensor in live.items():
            parts = self.names.get(name, ())
            if name in self.converted or id(tensor) not in known:
                more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
                made = f"makes of `{parts[0]}`{more}" if parts else "makes of other tensors"
                raise UsageError(
                    f"stochastic rounding of `{name}`, which transformers {made}: its elements lie"
                    " otherwise",
                    "use rounding nearest, or merge to disk with stochastic rounding",
                )


def trace(module: Any, keys: Iterable[str]) -> Traced:
    """Where each of the checkpoint's `keys` goes in `module`, a transformers model."""
    keys = tuple(keys)
    order = {key: place for place, key in enumerate(keys)}
    placed = Skeleton(module).trace(keys).placed
    return Traced(
        {
            name: tuple(sorted((part.key for part in parts), key=order.__getitem__))
            for name, parts in placed.items()
        },
        frozenset(
            name for name, parts in placed.items() if len(parts) > 1 or parts[0].pattern is not None
        ),
    )


def of_pair(module: Any, base: Iterable[str], instruct: Iterable[str]) -> Traced:
    """Where each tensor of `module` comes from, in instruct's names; in base's where instruct's
    files have nothing for it.

    A merge has instruct's names and layout, and rules and noise go by these.
    """
    left, right = trace(module, base), trace(module, instruct)
    return Traced(
        {**left.names, **right.names}, right.converted | (left.converted - right.names.keys())
    )


# --- content
#
# What the files of one side hold, and the proof that transformers made its tensors of these files
# and no others.
#
# A tensor that is a memory map of the very bytes of the checkpoint tensor it is named after needs
# no more proof. Any other (converted, upcast, a shard, or on a system that does not list its maps)
# is compared by its elements: transformers only moves and widens them, so the tensor and what it is
# made of must have the same ones, in whatever order.
#
#     digest = (Σ x mod 2^64, Σ x² mod 2^32), x the elements' bits as integers

Digest = tuple[int, int]
_PIECE = 1 << 19


class Content:
    """The sum of every tensor in the files of a checkpoint, of which transformers made `module`, in
    the dtypes of the files or wider ones.

    Ask for `check_source` first. Whoever reads the mapped tensors anyway passes each piece to
    `on_read`; `finish` reads what nobody has read.

    Attributes:
        sums: name → `pa_kernels.checksum` of a tensor's bytes; all of them after `finish`.
    """

    def __init__(self, checkpoint: Checkpoint, module: torch.nn.Module):
        self.checkpoint = checkpoint.duplicate()
        self.close = weakref.finalize(self, self.checkpoint.close)
        self.sums: dict[str, int] = {}
        self._mapped: dict[int, TensorInfo] = {}
        self._pieces: dict[str, dict[int, tuple[int, int]]] = {}
        self._made, self._split = _made(checkpoint, module), layout.split(module)

    def check_source(self, ranks: Ranks | Alone = ALONE) -> None:
        """Raise unless transformers made the module of these files.

        Args:
            ranks: the processes over which the module is split; each reads a part of the files.

        Cost: nothing for tensors that are maps of the files; one read of each other one, and of its
            tensors in the files.

        Raises:
            EngineError: a tensor is not made of these files, or see `Ranks.gather`.
            DataError: a file changed since its header was read.
        """
        made, self._made = self._made, []
        if ranks.world == 1:
            maps = FileMaps()
            made = [one for one in made if not self._is_map(one, maps)]
        wanted = {key: one.tensor.dtype for one in made for keys in one.sources for key in keys}
        mine = sorted(wanted if ranks.world == 1 else self.checkpoint.tensors)[
            ranks.rank :: ranks.world
        ]
        found = ranks.gather(
            "comparing with the files",
            lambda: (self._digests(mine, wanted), [_digest(one.tensor) for one in made]),
        )
        files = {key: digest for part, _ in found for key, digest in part.items()}
        self.sums |= {key: total for key, (total, _) in files.items()}
        digests = [
            (
                _added(column)
                if self._split.intersection(one.names)
                else column[0]
                if len(set(column)) == 1
                else None
            )
            for one, column in zip(made, zip(*(loaded for _, loaded in found)))
        ]
        _compare(
            self.checkpoint, made, digests, {key: digest for key, (_, digest) in files.items()}
        )

    def on_read(self, tensor: torch.Tensor, start: int, piece: torch.Tensor) -> None:
        """Note the elements of `tensor` from `start` on, which are in cache; from any thread.
        Nothing, where it is no map."""
        info = self._mapped.get(tensor.data_ptr())
        if info is not None and info.nbytes == tensor.nbytes and start % _PIECE == 0:
            self._pieces.setdefault(info.name, {})[start] = (
                start + piece.numel(),
                chunk_sum(piece, start),
            )

    def finish(self) -> str:
        """The content fingerprint of the checkpoint, 16 hex digits; how it is sharded does not
        matter.

        Cost: one read of what `on_read` was not told of.

        Raises:
            DataError: a file changed since its header was read.
        """
        for name, pieces in self._pieces.items():
            stops = [0, *(stop for _, (stop, _) in sorted(pieces.items()))]
            if sorted(pieces) == stops[:-1] and stops[-1] == self.checkpoint.tensors[name].count:
                self.sums[name] = sum(total for _, total in pieces.values()) % 2**64
        rest = self.checkpoint.tensors.keys() - self.sums.keys()
        self.sums |= {key: total for key, (total, _) in self._digests(rest, {}).items()}
        self._mapped, self._pieces = {}, {}
        self.checkpoint.check_all_unchanged()
        return as_hex(combine(self.sums))

    def _is_map(self, one: _Made, maps: FileMaps) -> bool:
        """Whether a tensor is a map of the only tensor in the files that it may be made of."""
        tensor = one.tensor
        place = (
            maps.position(tensor)
            if tensor.device.type == "cpu" and tensor.is_contiguous()
            else None
        )
        for key in (keys[0] for keys in one.sources if len(keys) == 1):
            info = self.checkpoint.tensors[key]
            if (
                place is None
                or place.offset != info.start
                or tensor.dtype != torch_dtype(info.dtype)
            ):
                continue
            file = self.checkpoint.file(key)
            same = place.inode == file.inode and (
                place.device == file.device or place.path == os.path.realpath(file.path)
            )
            if same and tensor.nbytes == info.nbytes:
                self._mapped[tensor.data_ptr()] = info
                return True
        return False

    def _digests(
        self, keys: Iterable[str], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, tuple[int, Digest]]:
        """Sum of the bytes, and digest of the elements at `dtypes`, of each of the checkpoint's
        tensors `keys`."""

        def work(info: TensorInfo, start: int, piece: torch.Tensor) -> tuple[int, Digest]:
            dtype = dtypes.get(info.name)
            return chunk_sum(piece, start), (
                (0, 0) if dtype is None else _piece_digest(_widened(piece, dtype))
            )

        infos = [self.checkpoint.tensors[key] for key in keys]
        found = over_tensors(
            lambda info, start, stop, out: self.checkpoint.chunk(info.name, start, stop, out),
            infos,
            work,
        )
        return {
            info.name: (
                sum(total for total, _ in parts) % 2**64,
                _added(digest for _, digest in parts),
            )
            for info, parts in found.items()
        }


class _Made:
    """A tensor of the model by all of its names, and for each name that the files feed, the tensors
    there that do."""

    def __init__(
        self, names: Sequence[str], tensor: torch.Tensor, sources: Sequence[Sequence[str]]
    ):
        self.names, self.tensor, self.sources = names, tensor, sources


def _made(checkpoint: Checkpoint, module: Any) -> list[_Made]:
    """The parameters of `module`, and those buffers that the files feed."""
    feeds = trace(module, checkpoint.tensors).names
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in layout.named(module):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    parameters = {id(layout.local(parameter)) for parameter in module.parameters()}
    made = [
        _Made(own, tensors[k], [feeds[name] for name in own if name in feeds])
        for k, own in names.items()
    ]
    return [one for one in made if one.sources or id(one.tensor) in parameters]


def _compare(
    checkpoint: Checkpoint,
    made: Sequence[_Made],
    digests: Sequence[Digest | None],
    files: Mapping[str, Digest],
) -> None:
    """Refuse tensors whose elements are not those of the files.

    Where one tensor of the files becomes several of the model, only the first of these is known to:
    they count together.
    """
    left = [
        (one, digest)
        for one, digest in zip(made, digests)
        if digest is None
        or all(digest != _added(files[key] for key in keys) for keys in one.sources)
    ]
    if not left:
        return
    keys = {key for one, _ in left for keys in one.sources for key in keys}
    split = (
        any(not one.sources for one, _ in left)
        and keys
        and all(digest is not None for _, digest in left)
    )
    if split and _added(digest for _, digest in left if digest) == _added(
        files[key] for key in keys
    ):
        return
    name = left[0][0].names[0]
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    raise EngineError(
        f"{checkpoint.folder}: transformers made {quoted(name)}{more} of other data than the files"
        f" that pa_fast reads hold, such as {checkpoint.files()[0].path.name}",
        "load it with from_pretrained to see which files it takes, and leave only one model in the"
        " folder; if there is, please report the architecture",
    )


def _digest(tensor: torch.Tensor) -> Digest:
    """The digest of all elements of a tensor; on a CPU one core per piece."""
    from pa_kernels.cores import over

    pieces = tensor.detach().reshape(-1).split(_PIECE)
    return _added(over(_piece_digest, pieces, tensor))


def _piece_digest(piece: torch.Tensor) -> Digest:
    import torch

    kind = {2: torch.int16, 4: torch.int32, 8: torch.int32}.get(piece.element_size(), torch.uint8)
    bits = piece.view(kind).to(torch.int32)
    return (
        int(bits.sum(dtype=torch.int64)) % 2**64,
        int((bits * bits).sum(dtype=torch.int64)) % 2**32,
    )


def _widened(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return piece.to(dtype) if piece.dtype.is_floating_point and dtype.is_floating_point else piece


def _added(digests: Iterable[Digest]) -> Digest:
    columns = list(zip(*digests)) or [(0,), (0,)]
    return sum(columns[0]) % 2**64, sum(columns[1]) % 2**32
