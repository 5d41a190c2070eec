"""Checkpoint tensors that each tensor of a model is made of, and the check that transformers made
it of these and no others."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.content import over_tensors
from pa_fast.checkpoint.names import Skeleton
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import TensorInfo, quoted, torch_dtype
from pa_fast.checkpoint.streaming import chunk_sum
from pa_fast.engines import layout
from pa_fast.engines.ranks import ALONE, Alone, Ranks
from pa_fast.errors import EngineError, UsageError
from pa_fast.live.memory import FileMaps

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TracedNames:
    """Checkpoint names of the tensors of a model.

    Attributes:
        names: live name → checkpoint names that it is made of, in the order of the checkpoint.
        converted: live names whose elements do not lie as in a checkpoint tensor: fused, split or
            transposed.
    """

    names: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]

    def check_elementwise(self, live: Mapping[str, object]) -> None:
        """Check that the elements of the live tensors lie as in the checkpoint, whose indices key
        the noise of stochastic rounding.

        Raises:
            UsageError: a tensor is converted, or no checkpoint tensor is known for it.
        """
        known = {id(tensor) for name, tensor in live.items() if name in self.names}
        for name, tensor in live.items():
            parts = self.names.get(name, ())
            if name in self.converted or id(tensor) not in known:
                more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
                origin = f"makes of `{parts[0]}`{more}" if parts else "makes of other tensors"
                raise UsageError(
                    f"stochastic rounding of `{name}`, which transformers {origin}: its"
                    " elements lie otherwise",
                    "use rounding nearest, or merge to disk with stochastic rounding",
                )


def trace(module: Any, keys: Iterable[str]) -> TracedNames:
    """Return the checkpoint's `keys` that each tensor of `module`, a transformers model, is made
    of."""
    keys = tuple(keys)
    order = {key: index for index, key in enumerate(keys)}
    placed = Skeleton(module).trace(keys).placed
    return TracedNames(
        {
            name: tuple(sorted((part.key for part in parts), key=order.__getitem__))
            for name, parts in placed.items()
        },
        frozenset(
            name for name, parts in placed.items() if len(parts) > 1 or parts[0].pattern is not None
        ),
    )


def of_pair(module: Any, base: Iterable[str], instruct: Iterable[str]) -> TracedNames:
    """Return the checkpoint names of each tensor of `module`: instruct's, or base's where
    instruct's files have nothing for it.

    A merge has instruct's names and layout, and rules and noise use these.
    """
    of_base, of_instruct = trace(module, base), trace(module, instruct)
    return TracedNames(
        {**of_base.names, **of_instruct.names},
        of_instruct.converted | (of_base.converted - of_instruct.names.keys()),
    )


# --- content

Digest = tuple[int, int]
"""(Σ x mod 2^64, Σ x² mod 2^32), x the elements' bits as integers: the same in any order."""
_PIECE = 1 << 19


class Content:
    """The checksum of every tensor in the files of a checkpoint, and the check that transformers
    made `module` of them, in the dtypes of the files or wider ones.

    A tensor that is a memory map of its checkpoint tensor needs no further check. Any other one
    (converted, upcast, a shard) is compared by digest, since transformers only moves and widens
    elements.

    Call `check_source` first. Pass each piece of a mapped tensor that is read anyway to `on_read`;
    `finish` reads the rest.

    Attributes:
        sums: name → `pa_kernels.checksum` of a tensor's bytes; all of them after `finish`.
    """

    def __init__(self, checkpoint: Checkpoint, module: torch.nn.Module):
        self.checkpoint = checkpoint.duplicate()
        self.close = weakref.finalize(self, self.checkpoint.close)
        self.sums: dict[str, int] = {}
        self._mapped: dict[int, TensorInfo] = {}
        self._pieces: dict[str, dict[int, tuple[int, int]]] = {}
        self._tensors, self._split = _model_tensors(checkpoint, module), layout.split(module)

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
        tensors, self._tensors = self._tensors, []
        if ranks.world == 1:
            maps = FileMaps()
            tensors = [one for one in tensors if not self._is_map(one, maps)]
        wanted = {key: one.tensor.dtype for one in tensors for keys in one.sources for key in keys}
        mine = sorted(wanted if ranks.world == 1 else self.checkpoint.tensors)[
            ranks.rank :: ranks.world
        ]
        gathered = ranks.gather(
            "comparing with the files",
            lambda: (self.digests(mine, wanted), [_digest(one.tensor) for one in tensors]),
        )
        files = {key: digest for part, _ in gathered for key, digest in part.items()}
        self.sums |= {key: total for key, (total, _) in files.items()}
        digests = [
            (
                _added(column)
                if self._split.intersection(one.names)
                else column[0]
                if len(set(column)) == 1
                else None
            )
            for one, column in zip(tensors, zip(*(loaded for _, loaded in gathered)))
        ]
        _check_digests(
            self.checkpoint, tensors, digests, {key: digest for key, (_, digest) in files.items()}
        )

    def on_read(self, tensor: torch.Tensor, start: int, piece: torch.Tensor) -> None:
        """Add up `piece`, the elements of `tensor` from `start` on, while it is in cache; from any
        thread. Does nothing for a tensor that is no memory map of the files."""
        info = self._mapped.get(tensor.data_ptr())
        if info is not None and info.nbytes == tensor.nbytes and start % _PIECE == 0:
            self._pieces.setdefault(info.name, {})[start] = (
                start + piece.numel(),
                chunk_sum(piece, start),
            )

    def finish(self) -> str:
        """Return the content fingerprint of the checkpoint, 16 hex digits, whatever its shards.

        Cost: one read of the tensors that `on_read` was not called with.

        Raises:
            DataError: a file changed since its header was read.
        """
        for name, pieces in self._pieces.items():
            stops = [0, *(stop for _, (stop, _) in sorted(pieces.items()))]
            if sorted(pieces) == stops[:-1] and stops[-1] == self.checkpoint.tensors[name].count:
                self.sums[name] = sum(total for _, total in pieces.values()) % 2**64
        rest = self.checkpoint.tensors.keys() - self.sums.keys()
        self.sums |= {key: total for key, (total, _) in self.digests(rest, {}).items()}
        self._mapped, self._pieces = {}, {}
        self.checkpoint.check_all_unchanged()
        return as_hex(combine(self.sums))

    def _is_map(self, one: _ModelTensor, maps: FileMaps) -> bool:
        """Return whether a tensor is a memory map of the one tensor in the files that it is made
        of."""
        tensor = one.tensor
        position = (
            maps.position(tensor)
            if tensor.device.type == "cpu" and tensor.is_contiguous()
            else None
        )
        for key in (keys[0] for keys in one.sources if len(keys) == 1):
            info = self.checkpoint.tensors[key]
            if (
                position is None
                or position.offset != info.start
                or tensor.dtype != torch_dtype(info.dtype)
            ):
                continue
            file = self.checkpoint.file(key)
            same = position.inode == file.inode and (
                position.device == file.device or position.path == os.path.realpath(file.path)
            )
            if same and tensor.nbytes == info.nbytes:
                self._mapped[tensor.data_ptr()] = info
                return True
        return False

    def digests(
        self, keys: Iterable[str], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, tuple[int, Digest]]:
        """Return the sum of the bytes, and the digest of the elements at `dtypes`, of each of the
        checkpoint's tensors `keys`."""

        def work(info: TensorInfo, start: int, piece: torch.Tensor) -> tuple[int, Digest]:
            dtype = dtypes.get(info.name)
            return chunk_sum(piece, start), (
                (0, 0) if dtype is None else _piece_digest(_widened(piece, dtype))
            )

        infos = [self.checkpoint.tensors[key] for key in keys]
        sums = over_tensors(
            lambda info, start, stop, out: self.checkpoint.chunk(info.name, start, stop, out),
            infos,
            work,
        )
        return {
            info.name: (
                sum(total for total, _ in parts) % 2**64,
                _added(digest for _, digest in parts),
            )
            for info, parts in sums.items()
        }


class _ModelTensor:
    """A tensor of the model with all its names, and for each name that the files have a source of,
    the names of these sources."""

    def __init__(
        self, names: Sequence[str], tensor: torch.Tensor, sources: Sequence[Sequence[str]]
    ):
        self.names, self.tensor, self.sources = names, tensor, sources


def _model_tensors(checkpoint: Checkpoint, module: Any) -> list[_ModelTensor]:
    """Return the parameters of `module`, and the buffers that the files have a source of."""
    sources = trace(module, checkpoint.tensors).names
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in layout.named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    parameters = {id(layout.local(parameter)) for parameter in module.parameters()}
    all_tensors = [
        _ModelTensor(own, tensors[k], [sources[name] for name in own if name in sources])
        for k, own in names.items()
    ]
    return [one for one in all_tensors if one.sources or id(one.tensor) in parameters]


def _check_digests(
    checkpoint: Checkpoint,
    tensors: Sequence[_ModelTensor],
    digests: Sequence[Digest | None],
    files: Mapping[str, Digest],
) -> None:
    """Raise EngineError if a tensor's elements are not those of the files.

    Where one tensor of the files becomes several of the model, sources are known for the first
    alone, so all of them are compared together.
    """
    differing = [
        (one, digest)
        for one, digest in zip(tensors, digests)
        if digest is None
        or all(digest != _added(files[key] for key in keys) for keys in one.sources)
    ]
    if not differing:
        return
    keys = {key for one, _ in differing for keys in one.sources for key in keys}
    split = (
        any(not one.sources for one, _ in differing)
        and keys
        and all(digest is not None for _, digest in differing)
    )
    if split and _added(digest for _, digest in differing if digest) == _added(
        files[key] for key in keys
    ):
        return
    name = differing[0][0].names[0]
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    raise EngineError(
        f"{checkpoint.folder}: transformers made {quoted(name)}{more} of other data than the files"
        f" that pa_fast reads hold, such as {checkpoint.files()[0].path.name}",
        "load it with from_pretrained to see which files it takes, and leave only one model in the"
        " folder; if there is, please report the architecture",
    )


def _digest(tensor: torch.Tensor) -> Digest:
    """Return the digest of all elements of a tensor; on a CPU one core per piece."""
    from pa_kernels.cores import parallel_map

    pieces = tensor.detach().reshape(-1).split(_PIECE)
    return _added(parallel_map(_piece_digest, pieces, tensor))


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
