"""The content of weight files, read in pieces: the checksum of each tensor, or another function."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import TensorInfo, WeightFile, torch_dtype
from pa_fast.checkpoint.streaming import chunk_sum, cuts

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
Read = Callable[[TensorInfo, int, int, "torch.Tensor"], "torch.Tensor"]
"""Function (tensor, start, stop, out) → its flattened elements `start` to `stop`, in `out`, as
`WeightFile.read`."""


def over_tensors(
    read: Read, infos: Iterable[TensorInfo], work: Callable[[TensorInfo, int, torch.Tensor], T]
) -> dict[TensorInfo, list[T]]:
    """Return `work(tensor, start, piece)` of every piece of each tensor, in order, computed on all
    cores.

    Cost: one read of the tensors, into memory of one piece (2^20 elements) per core.
    """
    from pa_kernels.cores import Scratch, over_cores

    scratch = Scratch()
    results: dict[TensorInfo, list[T]] = {info: [] for info in infos}
    pieces = [(info, *cut) for info in results for cut in cuts(info.count)]

    def one(piece: tuple[TensorInfo, int, int]) -> T:
        info, start, stop = piece
        return work(
            info,
            start,
            read(info, start, stop, scratch.take("piece", stop - start, torch_dtype(info.dtype))),
        )

    for (info, _, _), value in zip(pieces, over_cores(one, pieces)):
        results[info].append(value)
    return results


def content_sums(read: Read, infos: Iterable[TensorInfo]) -> dict[TensorInfo, int]:
    """Return `pa_kernels.checksum` of the bytes of each tensor."""
    results = over_tensors(read, infos, lambda info, start, piece: chunk_sum(piece, start))
    return {info: sum(parts) % 2**64 for info, parts in results.items()}


def content_fingerprint(checkpoint: Checkpoint) -> str:
    """Return the content fingerprint of a checkpoint, 16 hex digits, whatever its shards.

    Cost: one read of all its tensors.

    Raises:
        DataError: a file changed since its header was read.
    """
    sums = content_sums(
        lambda info, start, stop, out: checkpoint.chunk(info.name, start, stop, out),
        checkpoint.tensors.values(),
    )
    checkpoint.check_all_unchanged()
    return as_hex(combine({info.name: total for info, total in sums.items()}))


# --- file watcher


class FileWatcher:
    """Weight files that are memory-mapped elsewhere, held open to be checked before their bytes are
    read.

    A page that a file no longer has ends the process when it is touched, by a signal that Python
    cannot catch. A check beforehand is all that can be done: changes between check and touch go
    unseen.

    Args:
        checkpoints: their weight files are watched, through descriptors of the watcher's own, which
            outlive them.

    Cost: one descriptor per file, one system call per file and check.
    """

    def __init__(self, *checkpoints: Checkpoint):
        self._files = [
            file.duplicate() for checkpoint in checkpoints for file in checkpoint.files()
        ]
        self._known: dict[Path, dict[TensorInfo, int]] = {}
        self.close = weakref.finalize(self, _close, self._files)

    def know(self, checkpoint: Checkpoint, sums: Mapping[str, int]) -> None:
        """Take `sums` as the checksums of the tensors of `checkpoint`. They decide where a file was
        touched but looks the same."""
        for name, info in checkpoint.tensors.items():
            self._known.setdefault(info.file, {})[info] = sums[name]

    def add(self, file: WeightFile) -> None:
        """Watch `file` too, from now on."""
        self._files.append(file.duplicate())

    def check(self) -> None:
        """Raise DataError, naming the file, if a file changed since its header was read.

        Cost: one read of each file whose ctime alone changed (by a link, a permission, or a write
            after which the mtime was set back).
        """
        for file in self._files:
            known = self._known.get(file.path)
            if known is None or not file.is_touched():
                file.check()
                continue
            before = file.state
            try:
                file.accept()
                if content_sums(file.read, known) != known:
                    file.refuse("written to, and its mtime put back")
            except BaseException:
                file.state = before
                raise

    def check_names(self) -> None:
        """Check as `check` does, and that each name still belongs to its file: a map made by name
        may be of another one."""
        self.check()
        for file in self._files:
            file.check_name()


def _close(files: Iterable[WeightFile]) -> None:
    for file in files:
        file.close()
