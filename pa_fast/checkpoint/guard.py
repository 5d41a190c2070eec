"""Weight files that memory maps of somebody else lie in: held open, to be looked at before their
bytes are.

A page that a file no longer has ends the process when it is touched, with a signal that Python
cannot catch. Looking first is what can be done; what happens between the look and the touch cannot
be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from pa_fast.checkpoint.content import content_sums
from pa_fast.checkpoint.header import TensorInfo
from pa_fast.checkpoint.reader import Checkpoint, WeightFile


class Guard:
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
