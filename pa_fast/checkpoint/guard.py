"""Weight files that memory maps of somebody else lie in: held open, to be looked at before their bytes are.

A page that a file no longer has ends the process when it is touched, with a signal that Python cannot catch. Looking
first is what can be done; what happens between the look and the touch cannot be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from pa_fast.checkpoint.reader import Checkpoint, WeightFile


class Guard:
    """The weight files of `checkpoints`, and what is added, by descriptors of its own: it outlives them.

    Cost: one descriptor per file, one system call per file and look.
    """

    def __init__(self, *checkpoints: Checkpoint):
        self._files = [file.duplicate() for checkpoint in checkpoints for file in checkpoint.files()]
        self.close = weakref.finalize(self, _close, self._files)

    def add(self, file: WeightFile) -> None:
        """Look at `file` too, from now on."""
        self._files.append(file.duplicate())

    def check(self) -> None:
        """Raise DataError, naming the file, if one of them changed since its header was read."""
        for file in self._files:
            file.check()

    def check_names(self) -> None:
        """As `check`, and also if a name now belongs to another file: what was mapped by name may be that one."""
        self.check()
        for file in self._files:
            file.check_name()


def _close(files: Iterable[WeightFile]) -> None:
    for file in files:
        file.close()
