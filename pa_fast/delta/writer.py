"""From sources to a delta file: encoded, proven and written tensor by tensor; the file appears
whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import pa_kernels
import torch
from pa_kernels.cores import inference
from torch import Tensor

from pa_fast import files
from pa_fast.checkpoint.folder import INDEX, SINGLE
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.safetensors import read_header
from pa_fast.checkpoint.writer import output_errors
from pa_fast.delta.description import About, Description, Side
from pa_fast.delta.entry import Entry, Factors, Source, Store, kind, parts
from pa_fast.delta.mixed import Mixed
from pa_fast.errors import CheckpointError, OutputError, PairError

_ALIGNMENT = 64  # of the first tensor; those after it follow without a gap
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def write(
    path: str | Path,
    sources: Sequence[Source],
    store: Store,
    *,
    quick: tuple[str | None, str | None] = (None, None),
    overwrite: bool = False,
) -> Description:
    """Encode the delta between the sources and write it to the file `path`.

    Args:
        sources: one for each live float tensor, names distinct.
        store: what the delta keeps and how.
        quick: fingerprints of the files of base and instruct, where there are files.
        overwrite: replace a delta file that is there; it stays until the new one is complete.

    Cost: what the store says, and one more read of the sources for their fingerprints. Beside the
        sources, memory for one tensor: its entry, two live copies, and what encoding it takes.

    Raises:
        OutputError: the file exists or cannot be written.
        UsageError, DataError: see the store.
    """
    target = place(path, overwrite)
    names = Counter(source.name for source in sources)
    for name, times in names.items():
        if times > 1:
            raise PairError(f"`{name}` is given twice", "name every tensor once")
    content: dict[str, dict[str, int]] = {"base": {}, "instruct": {}}
    abouts: dict[str, About] = {}
    with _file(target) as file:
        data = _Data(file, sum(_header_room(source) for source in sources))
        for source, entry in zip(sources, store.encode(sources)):
            content["base"][source.name], content["instruct"][source.name] = pa_kernels.checksum(
                [source.base, source.instruct]
            )
            abouts[source.name] = _about(source, entry, data)
        base, instruct = (
            Side(as_hex(combine(sums)), files) for sums, files in zip(content.values(), quick)
        )
        said = Description(
            store.name,
            store.describe(),
            store.exact,
            store.lossless,
            base,
            instruct,
            _version(),
            abouts,
        )
        data.finish(said)
    return said


def place(path: str | Path, overwrite: bool = False, sources: Iterable[Path] = ()) -> Path:
    """Where a delta file for `path` goes, links followed.

    Args:
        overwrite: replace a delta file that is there, and nothing else.
        sources: checkpoint folders that are read: none of them gets a file that readers would take
            for its weights.

    Raises:
        OutputError: a folder or something else that is no delta file is there, or one that is not
            to be overwritten.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    if target.is_dir():
        raise OutputError(
            f"{path} is a folder, and a delta is one file",
            f"name a file in it: --out {Path(path) / 'delta'}",
        )
    if target.exists() and not target.is_file():
        raise OutputError(f"{path} is there, and is no file", "choose another --out")
    if target.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already", "choose another --out, or replace it with --overwrite"
        )
    if target.exists() and not _is_delta(target):
        raise OutputError(
            f"{path} exists, and is no delta file",
            "only a delta file is replaced: choose another --out",
        )
    if target.name in (SINGLE, INDEX) and target.parent in {
        Path(os.path.realpath(source)) for source in sources
    }:
        raise OutputError(
            f"{path} would be taken for weights of the source {target.parent}",
            "choose another --out",
        )
    return target


def _is_delta(path: Path) -> bool:
    """Whether `path` is a delta file, of whatever format."""
    try:
        return read_header(path).metadata.keys() >= {
            "format",
            "tensors",
            "store",
            "base",
            "instruct",
        }
    except CheckpointError:
        return False


def _about(source: Source, entry: Entry, data: _Data) -> About:
    named = parts(entry)
    for part, tensor in named.items():
        data.append(f"{source.name}::{part}", tensor)
    return About(
        kind(entry),
        tuple(source.base.shape),
        _DTYPES[source.base.dtype],
        _DTYPES[source.dtype],
        None if source.via is None else _DTYPES[source.via],
        as_hex(combine(dict(zip(named, pa_kernels.checksum(list(named.values())))))),
        _ends(source, entry),
    )


def _ends(source: Source, entry: Entry) -> tuple[str, str | None]:
    """Checksums of the live tensor at both ends, written as live weights will write them."""
    with inference():
        live = torch.empty(source.base.shape, dtype=source.dtype, device=source.device)
        weights = Mixed([live], [source.base.to(source.device)], [entry], [source.via])
        weights.restore_()
        weights.set_(1.0)
        end = as_hex(pa_kernels.checksum([live])[0])
        weights.set_(0.0)
        # how a product is summed, and so its last bits, is a device's own affair
        return as_hex(pa_kernels.checksum([live])[0]), None if isinstance(entry, Factors) else end


@dataclass
class _Data:
    """The tensors of a file in the making. Room for the header is kept free before them, since
    sizes are not known yet."""

    file: BinaryIO
    room: int
    at: int = 0
    entries: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.room += 4096
        self.room += -(8 + self.room) % _ALIGNMENT
        self.file.seek(8 + self.room)

    def append(self, name: str, tensor: Tensor) -> None:
        offsets = [self.at, self.at + tensor.nbytes]
        self.entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self.at = offsets[1]
        self.file.write(
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
        )

    def finish(self, said: Description) -> None:
        text = json.dumps(
            {"__metadata__": said.metadata(), **self.entries}, separators=(",", ":")
        ).encode()
        assert len(text) <= self.room, "the header outgrew the room that was kept for it"
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + text + b" " * (self.room - len(text)))


def _header_room(source: Source) -> int:
    """More bytes than one tensor can take in the header: its name five times, once quoted twice,
    and some numbers."""
    return 5 * len(json.dumps(json.dumps(source.name))) + 60 * source.base.dim() + 1000


@contextmanager
def _file(target: Path) -> Iterator[BinaryIO]:
    """A file to be filled, which becomes `target` when the block ends well, and is gone otherwise.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    partial = target.with_name(f".{target.name}.pa_fast.partial")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(files.lock_new(partial, target), "wb") as file:
            try:
                file.truncate(0)  # what a killed run left
                yield file
                file.flush()
                os.fsync(file.fileno())
                if not files.is_named(file.fileno(), partial):
                    raise OutputError(
                        f"{target}: another process began to write it", "run one at a time"
                    )
                files.rename(partial, target)
            except BaseException:
                if files.is_named(file.fileno(), partial):
                    partial.unlink(missing_ok=True)
                raise
        files.sync_finished(target.parent)


def _version() -> str:
    try:
        return version("pa_fast")
    except PackageNotFoundError:
        return "unknown"
