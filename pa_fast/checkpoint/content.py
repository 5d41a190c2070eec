"""What weight files hold, read once more in pieces: the sum of each tensor's bytes, or whatever
else is asked of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pa_fast.checkpoint.layout import chunk_sum
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import TensorInfo, WeightFile, torch_dtype
from pa_fast.checkpoint.streaming import cuts

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
Read = Callable[[TensorInfo, int, int, "torch.Tensor"], "torch.Tensor"]
"""(tensor, start, stop, out) → its flattened elements `start` to `stop`, in `out`: as
`WeightFile.read`."""


def over_tensors(
    read: Read, infos: Iterable[TensorInfo], work: Callable[[TensorInfo, int, torch.Tensor], T]
) -> dict[TensorInfo, list[T]]:
    """`work(tensor, start, piece)` of every piece of each tensor, in order; on every core at once.

    Cost: one read of the tensors, into memory of one piece (2^19 elements) per core.
    """
    from pa_kernels.cores import Scratch, over_cores

    scratch = Scratch()
    found: dict[TensorInfo, list[T]] = {info: [] for info in infos}
    pieces = [(info, *cut) for info in found for cut in cuts(info.count)]

    def one(piece: tuple[TensorInfo, int, int]) -> T:
        info, start, stop = piece
        return work(
            info,
            start,
            read(info, start, stop, scratch.take("piece", stop - start, torch_dtype(info.dtype))),
        )

    for (info, _, _), value in zip(pieces, over_cores(one, pieces)):
        found[info].append(value)
    return found


def content_sums(read: Read, infos: Iterable[TensorInfo]) -> dict[TensorInfo, int]:
    """`pa_kernels.checksum` of the bytes of each tensor."""
    found = over_tensors(read, infos, lambda info, start, piece: chunk_sum(piece, start))
    return {info: sum(parts) % 2**64 for info, parts in found.items()}


# --- guard
#
# Weight files that memory maps of somebody else lie in: held open, to be looked at before their
# bytes are.
#
# A page that a file no longer has ends the process when it is touched, with a signal that Python
# cannot catch. Looking first is what can be done; what happens between the look and the touch
# cannot be seen.


class FileWatcher:
    """The weight files of `checkpoints`, and what is added, by descriptors of its own: it outlives
    them.

    Cost: one descriptor per file, one system call per file and look.
    """

    def __init__(self, *checkpoints: Checkpoint):
        self._files = [
            file.duplicate() for checkpoint in checkpoints for file in checkpoint.files()
        ]
        self._known: dict[Path, dict[TensorInfo, int]] = {}
        self.close = weakref.finalize(self, _close, self._files)

    def know(self, checkpoint: Checkpoint, sums: Mapping[str, int]) -> None:
        """Take `sums` for what the tensors of `checkpoint` sum to: they decide where a file was
        touched and looks as it did."""
        for name, info in checkpoint.tensors.items():
            self._known.setdefault(info.file, {})[info] = sums[name]

    def add(self, file: WeightFile) -> None:
        """Look at `file` too, from now on."""
        self._files.append(file.duplicate())

    def check(self) -> None:
        """Raise DataError, naming the file, if one of them changed since its header was read.

        Cost: where a ctime alone moved (a link, a permission, or bytes and the mtime put back), one
            read of that file.
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
        """As `check`, and also if a name now belongs to another file: what was mapped by name may
        be that one."""
        self.check()
        for file in self._files:
            file.check_name()


def _close(files: Iterable[WeightFile]) -> None:
    for file in files:
        file.close()
