"""A delta file open for reading: a safetensors file of one entry per live tensor, and what it says
of itself.

Every field can lie. What the header says is checked before any tensor is read, and each entry
before it is handed out.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import pa_kernels
from pa_kernels import PackedTensor, SparseTensor

from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.safetensors import (
    FLOATS,
    TensorInfo,
    WeightFile,
    quoted,
    read_header,
    torch_dtype,
)
from pa_fast.delta.description import KINDS, About, Description, described
from pa_fast.delta.entry import Entry, Factors, Whole
from pa_fast.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_AGAIN = "the file is damaged or was not written by pa_fast: encode the delta again"


class DeltaFile:
    """The delta file `path`. Make one with `DeltaFile.open`; a context manager.

    What it hands out for a CPU are views of a memory map of the file, read only, apart from what
    the file misaligns.

    Attributes:
        about: what the file says of itself.
        file: the file itself, to be watched where its maps are kept.
    """

    def __init__(
        self, path: Path, about: Description, infos: dict[str, TensorInfo], file: WeightFile
    ):
        self.path, self.about, self._infos, self.file = path, about, infos, file

    @classmethod
    def open(cls, path: str | Path) -> DeltaFile:
        """Read and check the header and all that it says; no tensor data.

        Raises:
            CheckpointError: missing, no delta file, of another format, or inconsistent in any way
                that the header shows.
        """
        path = Path(path)
        header = read_header(path)
        about = described(header.metadata, str(path))
        expected = {
            f"{name}::{part}" for name, one in about.tensors.items() for part in KINDS[one.kind]
        }
        odd = sorted(expected ^ header.tensors.keys())
        if odd:
            what = (
                "is missing"
                if odd[0] in expected
                else "belongs to no tensor that the metadata describe"
            )
            raise CheckpointError(f"{path}: tensor {quoted(odd[0])} {what}", _AGAIN)
        for name, one in about.tensors.items():
            _check_parts(
                path,
                name,
                one,
                {part: header.tensors[f"{name}::{part}"] for part in KINDS[one.kind]},
            )
        return cls(path, about, header.tensors, WeightFile(path, header.size_bytes))

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(info.nbytes for info in self._infos.values())

    def entry(self, name: str, device: torch.device | str = "cpu") -> Entry:
        """The entry of tensor `name` on `device`, every byte of it checked.

        Cost: one read of the entry's bytes for their sum, one for its positions.

        Raises:
            KeyError: no such tensor.
            CheckpointError: its bytes are not those that were written, or its positions lead out of
                the tensor.
            DataError: the file changed since its header was read.
        """
        about = self.about.tensors[name]
        read = {part: self._tensor(f"{name}::{part}") for part in KINDS[about.kind]}
        found = as_hex(combine(dict(zip(read, pa_kernels.checksum(list(read.values()))))))
        if found != about.data:
            raise CheckpointError(
                f"{self.path}: tensor {quoted(name)}: content {found}, expected {about.data}",
                _AGAIN,
            )
        moved = {
            part: tensor if part == "span" else tensor.to(device) for part, tensor in read.items()
        }
        if about.kind == "whole":
            return Whole(**moved)
        if about.kind == "factors":
            return Factors(**moved)
        count = math.prod(about.shape)
        found_entry: PackedTensor | SparseTensor
        if about.kind in ("packed8", "packed16"):
            found_entry = PackedTensor(
                torch_dtype(about.live), count, int(about.kind.removeprefix("packed")), **moved
            )
        else:
            found_entry = SparseTensor(about.kind, count, **moved)  # type: ignore[arg-type]
        try:
            found_entry.check()
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)}: {error}", _AGAIN) from None
        return found_entry

    def close(self) -> None:
        """Close the file. Maps live on while a view of them does."""
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

    def _tensor(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        return self.file.elements(info, 0, info.count).view(info.shape)


def _check_parts(path: Path, name: str, about: About, infos: dict[str, TensorInfo]) -> None:
    """Refuse parts whose dtypes or shapes do not fit each other or the tensor. Positions are looked
    into by `entry`."""

    def refuse(part: str, expected: str) -> CheckpointError:
        found = f"{infos[part].dtype} {list(infos[part].shape)}"
        return CheckpointError(
            f"{path}: tensor {quoted(f'{name}::{part}')} is {found}, expected {expected}", _AGAIN
        )

    packed = about.kind.startswith("packed")
    wheres = {"index": "U16", "bitmap": "I32", "packed8": "U16", "packed16": "U16"}
    lists = {
        "where": wheres.get(about.kind),
        "starts": "I32" if packed else "I64",
        "codes": "I16",
        "span": "F32",
    }
    for part, info in infos.items():
        if part in lists:
            if info.dtype != lists[part] or len(info.shape) != 1:
                raise refuse(part, f"a list of {lists[part]}")
        elif info.dtype not in FLOATS:
            raise refuse(part, f"one of {', '.join(sorted(FLOATS))}")
    if about.kind == "whole" and infos["target"].shape != about.shape:
        raise refuse("target", f"shape {list(about.shape)}")
    if packed:
        for part in ("base", "target"):
            if infos[part].dtype != about.live or infos[part].shape != infos["where"].shape:
                raise refuse(part, f"{about.live} {list(infos['where'].shape)}")
    if about.kind in ("index", "bitmap"):
        if infos["base"].dtype != about.base or len(infos["base"].shape) != 1:
            raise refuse("base", f"a list of {about.base}")
        if infos["target"].shape != infos["base"].shape:
            raise refuse("target", f"shape {list(infos['base'].shape)}")
    if about.kind == "factors":
        u, v = infos["u"], infos["v"]
        if len(about.shape) not in (2, 3) or len(u.shape) != len(about.shape):
            raise refuse(
                "u",
                f"factors of a matrix, or of a stack of them; the tensor is {list(about.shape)}",
            )
        rank = u.shape[-1]
        if u.shape != (*about.shape[:-1], rank):
            raise refuse("u", f"shape {[*about.shape[:-1], rank]}")
        if v.shape != (*about.shape[:-2], rank, about.shape[-1]) or v.dtype != u.dtype:
            raise refuse("v", f"{u.dtype} {[*about.shape[:-2], rank, about.shape[-1]]}")
