"""A delta file: a safetensors file of one entry per live tensor, with a description of itself.

`__metadata__` of the header holds

    format      "3"; "2" has checksums of version 1 and packed codes of another parity, and "1" is
                also without sum
    sum         64 bits of BLAKE2b over all other metadata, 16 hex digits: detects edits
    store       the store of the delta: dense, packed, sparse or lowrank
    options     the store's options in one line
    exact, lossless     "true" or "false", see `Store`
    base, instruct      JSON {"content", "quick"}: fingerprints of the two sides
    pa_fast     version that wrote it
    tensors     JSON, live tensor -> {"kind", "shape", "base", "live", "via", "data", "ends"}

No field is trusted: the header is checked before any tensor is read, and each entry before it is
returned. A file is encoded, checked and written tensor by tensor, and appears complete or not at
all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

import pa_kernels
import torch
from pa_kernels.cores import inference
from pa_kernels.reference import CHECKSUM_VERSION
from torch import Tensor

from pa_fast import files
from pa_fast.checkpoint.folder import INDEX, SINGLE
from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.safetensors import (
    FLOATS,
    MAX_DIMENSIONS,
    TensorInfo,
    WeightFile,
    parse_object,
    quoted,
    read_header,
)
from pa_fast.checkpoint.writer import output_errors
from pa_fast.errors import CheckpointError, OutputError, PairError
from pa_fast.files import path_of
from pa_fast.stores import registry
from pa_fast.stores.composite import CompositeStore
from pa_fast.stores.store import Entry, Source, Store, TensorDescription

FORMAT = "3"
_UNSUMMED = "1"
"""The first format, which can still be read. Its texts are not protected by a sum."""
CHECKSUM_VERSIONS = {FORMAT: CHECKSUM_VERSION, "2": 1, _UNSUMMED: 1}
"""By format of the file, the version of its checksums. All of them are checked as they are. What
else was different before is the matter of `Store.of_older_format`."""

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_ALIGNMENT = 64  # of the first tensor; those after it follow without a gap
_WRITTEN = "give a file that `pa-fast encode` wrote"
_AGAIN = "the file is damaged or was not written by pa_fast: encode the delta again"
_SUM = re.compile(r"[0-9a-f]{16}")
_KEYS = ("kind", "shape", "base", "live", "via", "data", "ends")


@dataclass(frozen=True)
class Side:
    """One side of the pair: the fingerprint of its tensors by their names in the model, and of its
    files if it had files."""

    content: str
    quick: str | None = None


@dataclass(frozen=True)
class Description:
    """The description of a delta file.

    Attributes:
        checksum_version: version of the checksums in it, see `pa_kernels.reference.checksum`.
    """

    store: str
    options: str
    exact: bool
    lossless: bool
    base: Side
    instruct: Side
    pa_fast: str
    tensors: Mapping[str, TensorDescription]
    checksum_version: int = CHECKSUM_VERSION

    attached: ClassVar[bool] = False
    """The delta of a file is merged, unless the caller that loads it asks otherwise."""

    def fingerprint(self) -> str:
        """Return one number over every entry, in hex."""
        return as_hex(combine({name: int(one.data, 16) for name, one in self.tensors.items()}))

    @property
    def notes(self) -> list[str]:
        """Notes on the file, for who opens it."""
        if self.checksum_version == CHECKSUM_VERSION:
            return []
        return [
            f"the delta file was written by pa_fast {self.pa_fast}, with checksums of version"
            f" {self.checksum_version}, by which it is verified; files encoded today have those of"
            f" version {CHECKSUM_VERSION}"
        ]

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the header."""
        tensors = {
            name: dict(zip(_KEYS, asdict(one).values())) for name, one in self.tensors.items()
        }
        metadata = {
            "format": FORMAT,
            "store": self.store,
            "options": self.options,
            "exact": json.dumps(self.exact),
            "lossless": json.dumps(self.lossless),
            "base": json.dumps(asdict(self.base)),
            "instruct": json.dumps(asdict(self.instruct)),
            "pa_fast": self.pa_fast,
            "tensors": json.dumps(tensors, separators=(",", ":")),
        }
        return {**metadata, "sum": sum_of(metadata)}


def sum_of(metadata: Mapping[str, str]) -> str:
    """Return the `sum` of all other entries of `metadata`, in hex."""
    rest = sorted((key, value) for key, value in metadata.items() if key != "sum")
    return hashlib.blake2b(json.dumps(rest).encode(), digest_size=8).hexdigest()


class DeltaFile:
    """A delta file open for reading. Make one with `DeltaFile.open`; a context manager.

    Tensors on a CPU are read-only views of a memory map of the file, or copies if the file
    misaligns them, or is of an older format that had them otherwise.

    Attributes:
        description: the description in the file.
        file: the file itself, to be watched as long as its maps are kept.
    """

    def __init__(
        self,
        path: Path,
        description: Description,
        infos: Mapping[str, TensorInfo],
        file: WeightFile,
        *,
        is_older: bool,
    ):
        self.path, self.description, self.file = path, description, file
        self._is_older = is_older
        self._infos, self._kinds = infos, registry.kinds()

    @classmethod
    def open(cls, path: str | Path) -> DeltaFile:
        """Read and check the header and the description in it; no tensor data are read.

        Raises:
            UsageError: `path` is no path.
            CheckpointError: the file is missing, is not a delta file, is of another format, or is
                inconsistent in any way that the header shows.
        """
        path, kinds = path_of(path, "delta"), registry.kinds()
        if path.is_dir():
            raise CheckpointError(f"{path}: a folder, expected a delta file", _WRITTEN)
        try:
            header = read_header(path)
        except CheckpointError as error:
            hint = f"{_WRITTEN}, or encode again if this is one"
            raise CheckpointError(error.message, hint if path.exists() else error.hint) from None
        description = _described(header.metadata, str(path))
        expected = {
            f"{name}::{part}"
            for name, tensor in description.tensors.items()
            for part in kinds[tensor.kind].parts_of(tensor.kind)
        }
        odd = sorted(expected ^ header.tensors.keys())
        if odd:
            stray = "belongs to no tensor that the metadata describe"
            what = "is missing" if odd[0] in expected else stray
            raise CheckpointError(f"{path}: tensor {quoted(odd[0])} {what}", _AGAIN)
        for name, tensor in description.tensors.items():
            store = kinds[tensor.kind]
            names = store.parts_of(tensor.kind)
            infos = {part: header.tensors[f"{name}::{part}"] for part in names}
            for part, fits, rule in store.part_rules(tensor, infos):
                if not fits:
                    actual = f"{infos[part].dtype} {list(infos[part].shape)}"
                    raise CheckpointError(
                        f"{path}: tensor {quoted(f'{name}::{part}')} is {actual}, expected {rule}",
                        _AGAIN,
                    )
        file = WeightFile(path, header.size_bytes)
        is_older = header.metadata["format"] != FORMAT
        return cls(path, description, header.tensors, file, is_older=is_older)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(info.nbytes for info in self._infos.values())

    def entry(self, name: str, device: torch.device | str = "cpu") -> Entry:
        """Return the entry of tensor `name` on `device`, every byte of it checked.

        Cost: one read of the entry's bytes for their sum, and one of its positions.

        Raises:
            KeyError: no such tensor.
            CheckpointError: its bytes are not those that were written, or its positions lead out of
                the tensor.
            DataError: the file changed since its header was read.
        """
        tensor = self.description.tensors[name]
        store = self._kinds[tensor.kind]
        names = store.parts_of(tensor.kind)
        parts = {part: self._tensor(f"{name}::{part}") for part in names}
        content = _content(parts, self.description.checksum_version)
        if content != tensor.data:
            raise CheckpointError(
                f"{self.path}: tensor {quoted(name)}: content {content}, expected {tensor.data}",
                _AGAIN,
            )
        if self._is_older:
            parts = store.of_older_format(tensor, parts)
        moved = {n: p if n in store.host_parts else p.to(device) for n, p in parts.items()}
        try:
            return store.from_parts(tensor, moved)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)}: {error}", _AGAIN) from None

    def close(self) -> None:
        """Close the file. A map lives on as long as a view of it."""
        self.file.close()

    def __enter__(self) -> DeltaFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> Tensor:
        info = self._infos[name]
        return self.file.elements(info, 0, info.count).view(info.shape)


def _described(metadata: Mapping[str, str], where: str) -> Description:
    """Return the description in the metadata of the file `where`.

    Raises:
        CheckpointError: it is not a delta file, is of another format, or has a malformed field.
    """

    def refuse(what: str, hint: str = _AGAIN) -> CheckpointError:
        return CheckpointError(f"{where}: {what}", hint)

    if "format" not in metadata or "tensors" not in metadata:
        raise refuse("a safetensors file, but no delta", _WRITTEN)
    if metadata["format"] not in CHECKSUM_VERSIONS:
        raise refuse(
            f"delta format {quoted(metadata['format'])}, expected"
            f" {', '.join(sorted(CHECKSUM_VERSIONS))}",
            "encode the delta again, or use the pa_fast that wrote it",
        )
    summed = metadata["format"] != _UNSUMMED
    expected = {"format", "tensors", "base", "instruct", "pa_fast"}
    expected |= {"store", "options", "exact", "lossless", *(["sum"] if summed else [])}
    if metadata.keys() != expected:
        odd = min(metadata.keys() ^ expected)
        what = "missing" if odd in expected else "not of this format"
        raise refuse(f"metadata {quoted(odd)} is {what}")
    for key in ("store", "options", "pa_fast"):
        if not metadata[key].isprintable() or len(metadata[key]) > 1000:
            raise refuse(f"metadata `{key}` is not a short printable text")
    for key in ("exact", "lossless"):
        if metadata[key] not in ("true", "false"):
            raise refuse(f"metadata `{key}` is {quoted(metadata[key])}, expected true or false")
    tensors = parse_object(
        metadata["tensors"].encode(errors="surrogatepass"), f"{where}: metadata `tensors`"
    )
    description = Description(
        metadata["store"],
        metadata["options"],
        metadata["exact"] == "true",
        metadata["lossless"] == "true",
        _side(metadata["base"], f"{where}: metadata `base`"),
        _side(metadata["instruct"], f"{where}: metadata `instruct`"),
        metadata["pa_fast"],
        {n: _tensor(fields, f"{where}: tensor {quoted(n)}") for n, fields in tensors.items()},
        CHECKSUM_VERSIONS[metadata["format"]],
    )
    if summed and metadata["sum"] != (total := sum_of(metadata)):
        raise refuse(
            f"its metadata have sum {total}, expected {quoted(metadata['sum'])}: somebody edited"
            " them"
        )
    return description


def _side(text: str, where: str) -> Side:
    fields = parse_object(text.encode(errors="surrogatepass"), where)
    if (
        fields.keys() != {"content", "quick"}
        or not _is_sum(fields["content"])
        or not (fields["quick"] is None or _is_sum(fields["quick"]))
    ):
        raise CheckpointError(
            f"{where}: {quoted(text)}, expected two fingerprints of 16 hex digits", _AGAIN
        )
    return Side(fields["content"], fields["quick"])


def _tensor(fields: Any, where: str) -> TensorDescription:
    if not isinstance(fields, dict) or fields.keys() != set(_KEYS):
        raise CheckpointError(f"{where}: expected an object of {', '.join(_KEYS)}", _AGAIN)
    kind, shape, base, live, intermediate_dtype, data, endpoints = (fields[key] for key in _KEYS)
    kinds, floats = registry.kinds(), ", ".join(sorted(FLOATS))
    sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    pair = isinstance(endpoints, list) and len(endpoints) == 2
    for key, fits, expected in (
        ("kind", isinstance(kind, str) and kind in kinds, f"one of {', '.join(kinds)}"),
        ("shape", sizes and len(shape) <= MAX_DIMENSIONS, f"at most {MAX_DIMENSIONS} sizes"),
        ("shape", sizes and _count(shape) < 2**63, "fewer elements than 2^63"),
        ("base", isinstance(base, str) and base in FLOATS, f"one of {floats}"),
        ("live", isinstance(live, str) and live in FLOATS, f"one of {floats}"),
        (
            "via",
            intermediate_dtype is None
            or (isinstance(intermediate_dtype, str) and intermediate_dtype in FLOATS),
            f"one of {floats}",
        ),
        ("data", _is_sum(data), "16 hex digits"),
        (
            "ends",
            pair and all(end is None or _is_sum(end) for end in endpoints),
            "two checksums of 16 hex digits",
        ),
    ):
        if not fits:
            raise CheckpointError(
                f"{where}: `{key}` is {quoted(str(fields[key]))}, expected {expected}", _AGAIN
            )
    return TensorDescription(
        kind, tuple(shape), base, live, intermediate_dtype, data, (endpoints[0], endpoints[1])
    )


def _count(shape: Sequence[int]) -> int:
    """Return the number of elements of a tensor, with empty dimensions counted as one, because
    sizes are multiplied before they are checked."""
    return math.prod(max(n, 1) for n in shape[:MAX_DIMENSIONS])


def _is_sum(value: Any) -> bool:
    return isinstance(value, str) and _SUM.fullmatch(value) is not None


def _content(parts: Mapping[str, Tensor], version: int = CHECKSUM_VERSION) -> str:
    """Return the fingerprint of an entry's tensors, in hex, of checksums of that version."""
    return as_hex(combine(dict(zip(parts, pa_kernels.checksum(list(parts.values()), version)))))


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
        store: the store that encodes the delta.
        quick: fingerprints of the files of base and instruct, if there are files.
        overwrite: replace an existing delta file; it stays until the new one is complete.

    Cost: that of the store, and one more read of the sources for their fingerprints. Beside the
        sources, memory for one tensor: its entry, two live copies, and the scratch of its encoding.

    Raises:
        OutputError: the file exists or cannot be written.
        UsageError, DataError: see the store.
    """
    target = output_path(path, overwrite)
    for name, times in Counter(source.name for source in sources).items():
        if times > 1:
            raise PairError(f"`{name}` is given twice", "name every tensor once")
    content: dict[str, dict[str, int]] = {"base": {}, "instruct": {}}
    tensors: dict[str, TensorDescription] = {}
    with _new_file(target) as file:
        data = _Data(file, sum(_header_bytes(source) for source in sources))
        for source, entry in zip(sources, store.encode(sources)):
            content["base"][source.name], content["instruct"][source.name] = pa_kernels.checksum(
                [source.base, source.instruct]
            )
            tensors[source.name] = data.append(source, entry)
        base, instruct = (
            Side(as_hex(combine(sums)), fingerprint)
            for sums, fingerprint in zip(content.values(), quick)
        )
        how = store.name, store.describe(), store.exact, store.lossless
        description = Description(*how, base, instruct, _version(), tensors)
        data.finish(description)
    return description


def output_path(path: str | Path, overwrite: bool = False, sources: Iterable[Path] = ()) -> Path:
    """Return the path to write the delta file `path` to, links followed.

    Args:
        overwrite: replace an existing delta file, and nothing else.
        sources: checkpoint folders that are read: no file is written to them that readers would
            take for weights.

    Raises:
        OutputError: there is a folder or another thing that is not a delta file, or a delta file
            that must not be overwritten.
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
    """Return whether `path` is a delta file, of any format."""
    keys = {"format", "tensors", "store", "base", "instruct"}
    try:
        return read_header(path).metadata.keys() >= keys
    except CheckpointError:
        return False


def _endpoint_sums(source: Source, entry: Entry) -> tuple[str, str | None]:
    """Return the checksums of the live tensor at λ = 0 and 1, written as live weights will write
    them."""
    with inference():
        live = torch.empty(source.base.shape, dtype=source.dtype, device=source.device)
        base = source.base.to(source.device)
        store = CompositeStore([live], [base], [entry], [source.intermediate_dtype])
        store.restore_()
        store.set_(1.0)
        end = as_hex(pa_kernels.checksum([live])[0])
        store.set_(0.0)
        exact = registry.owner(entry).exact  # else the last bits depend on the device
        return as_hex(pa_kernels.checksum([live])[0]), end if exact else None


@dataclass
class _Data:
    """The tensors of a file while it is written. Bytes for the header are reserved before them,
    because sizes are not known yet."""

    file: BinaryIO
    header_bytes: int
    end: int = 0
    infos: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.header_bytes += 4096
        self.header_bytes += -(8 + self.header_bytes) % _ALIGNMENT
        self.file.seek(8 + self.header_bytes)

    def append(self, source: Source, entry: Entry) -> TensorDescription:
        """Write the parts of an entry, and return their description."""
        store = registry.owner(entry)
        parts = store.parts(entry)
        for part, tensor in parts.items():
            offsets = [self.end, self.end + tensor.nbytes]
            self.infos[f"{source.name}::{part}"] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            self.end = offsets[1]
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self.file.write(flat.cpu().numpy().data)
        between = source.intermediate_dtype
        return TensorDescription(
            store.kind(entry),
            tuple(source.base.shape),
            _DTYPES[source.base.dtype],
            _DTYPES[source.dtype],
            None if between is None else _DTYPES[between],
            _content(parts),
            _endpoint_sums(source, entry),
        )

    def finish(self, description: Description) -> None:
        """Write the header."""
        document = {"__metadata__": description.metadata(), **self.infos}
        text = json.dumps(document, separators=(",", ":")).encode()
        assert len(text) <= self.header_bytes, "the header outgrew the bytes kept for it"
        self.file.seek(0)
        self.file.write(self.header_bytes.to_bytes(8, "little") + text.ljust(self.header_bytes))


def _header_bytes(source: Source) -> int:
    """Return a bound for the bytes of one tensor in the header: its name five times, once quoted
    twice, and some numbers."""
    return 5 * len(json.dumps(json.dumps(source.name))) + 60 * source.base.dim() + 1000


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file to be filled, which becomes `target` if the block ends without an error, and is
    removed otherwise.

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
