"""The files of a checkpoint folder beside its weights: which ones a merge copies, and which no
reader may open.

A checkpoint may come from anyone. A link in it can lead to any file of this machine, whose content
would then stand in the merge; a pipe blocks whoever opens it. So each file is looked at before
anything is read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pa_fast.checkpoint.document import refuse_pointer, regular_size
from pa_fast.errors import CheckpointError

PROVENANCE = "pa_fast.json"
TEMPLATES = "additional_chat_templates"
# weights and training state of any kind: the merge has its own
_NOT_COPIED = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".pkl",
    ".pickle",
    ".npz",
    ".tflite",
)
_WRITTEN = {"config.json", "README.md", PROVENANCE}


@dataclass(frozen=True)
class Companion:
    """A file of a checkpoint folder: `name` in it (of a folder within, with a slash), `path` with
    links resolved, length."""

    name: str
    path: Path
    size_bytes: int

    def open(self) -> BinaryIO:
        """Open the file for reading.

        Raises:
            OSError: it cannot be opened, or is no plain file any more.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file any more", str(self.path))
        return os.fdopen(fd, "rb")


def copied(folder: Path) -> list[Companion]:
    """The files that a merge copies from the instruct checkpoint `folder`.

    Raises:
        CheckpointError: see `check_companions`.
    """
    check_companions(folder)
    files = (
        path
        for path in _files(folder)
        if path.name not in _WRITTEN and not path.name.startswith("adapter_")
    )
    return [
        Companion(
            path.relative_to(folder).as_posix(), Path(os.path.realpath(path)), regular_size(path)
        )
        for path in files
    ]


def check_companions(folder: Path) -> None:
    """Refuse a checkpoint folder in which a file leads out of it or to nothing, or is a pipe or a
    device.

    Links within the folder are fine, and those of a hub cache:
    `models--ORG--NAME/snapshots/COMMIT/FILE` → `../../blobs/…`.

    Raises:
        CheckpointError: naming the file; also one that is a git-lfs pointer.
    """
    for path in _files(folder):
        regular_size(path)
        with path.open("rb") as file:
            refuse_pointer(path, file.read(1024))
    root = Path(os.path.realpath(folder))
    homes = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        homes.append(root.parent.parent / "blobs")
    for path in _files(folder):
        real = Path(os.path.realpath(path))
        if not any(home in real.parents for home in homes):
            raise CheckpointError(
                f"{path}: a link that leads out of the folder, to {real}",
                "a file of another place may be none of this checkpoint's: put a copy in place of"
                " the link, if it is",
            )


def check_regular(folder: Path) -> None:
    """Refuse a checkpoint folder in which a file is a pipe or a device: opening or reading it may
    never end.

    Raises:
        CheckpointError: naming the file.
    """
    for path in _files(folder):
        if path.exists():
            regular_size(path)


def _files(folder: Path) -> Iterator[Path]:
    """Everything but weights, hidden files and folders."""
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir():
            yield from sorted(path.glob("*.jinja"))
        elif (
            not path.name.startswith(".")
            and not path.name.endswith(_NOT_COPIED)
            and not path.is_dir()
        ):
            yield path
