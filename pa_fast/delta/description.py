"""What a delta file says of itself: the `__metadata__` of its header, which nobody has vouched for
when it is read.

format      "2"; "1" is without sum
sum         64 bits of BLAKE2b over all other metadata, 16 hex digits: nothing in them was edited
store       how the delta is held: dense, packed, sparse or lowrank
options     the store's options in one line
exact, lossless                     "true" or "false", see `pa_fast.delta.entry.Store`
base, instruct                      JSON {"content", "quick"}: fingerprints of the two sides
pa_fast     version that wrote it
tensors     JSON, live tensor -> {"kind", "shape", "base", "live", "via", "data", "ends"}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.safetensors import FLOATS, MAX_DIMENSIONS, parse_object, quoted
from pa_fast.errors import CheckpointError

FORMAT = "2"
_UNSUMMED = "1"
"""The format before, which is read still: its free texts are what it says they are."""

_PACKED = ("codes", "starts", "where", "base", "target", "span")
KINDS = {
    "whole": ("target",),
    "index": ("where", "starts", "base", "target"),
    "bitmap": ("where", "starts", "base", "target"),
    "packed8": _PACKED,
    "packed16": _PACKED,
    "factors": ("u", "v"),
}
"""The kinds of entries, and the tensors of each: `NAME::PART` in the file."""

_AGAIN = "the file is damaged or was not written by pa_fast: encode the delta again"
_SUM = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Side:
    """A side of the pair: the fingerprint of its tensors by their names in the model, and of its
    files where it had files."""

    content: str
    quick: str | None = None


@dataclass(frozen=True)
class About:
    """One tensor of a delta.

    Attributes:
        kind: one of KINDS.
        shape: of the live tensor.
        base, live, via: safetensors dtypes of base and live tensor, and the one to round to before
            the latter, or None.
        data: fingerprint of the parts, in hex.
        ends: checksums of the live tensor at λ = 0 and 1, in hex; None where they depend on the
            device.
    """

    kind: str
    shape: tuple[int, ...]
    base: str
    live: str
    via: str | None
    data: str
    ends: tuple[str | None, str | None]


@dataclass(frozen=True)
class Description:
    """Everything that a delta file says of itself."""

    store: str
    options: str
    exact: bool
    lossless: bool
    base: Side
    instruct: Side
    pa_fast: str
    tensors: Mapping[str, About]

    def fingerprint(self) -> str:
        """One number that every entry enters, in hex."""
        return as_hex(combine({name: int(about.data, 16) for name, about in self.tensors.items()}))

    def metadata(self) -> dict[str, str]:
        """What stands in the header."""
        said = {
            "format": FORMAT,
            "store": self.store,
            "options": self.options,
            "exact": json.dumps(self.exact),
            "lossless": json.dumps(self.lossless),
            "base": json.dumps(asdict(self.base)),
            "instruct": json.dumps(asdict(self.instruct)),
            "pa_fast": self.pa_fast,
            "tensors": json.dumps(
                {name: asdict(about) for name, about in self.tensors.items()}, separators=(",", ":")
            ),
        }
        return {**said, "sum": sum_of(said)}


def sum_of(metadata: Mapping[str, str]) -> str:
    """The `sum` of everything else in `metadata`, in hex."""
    said = sorted((key, value) for key, value in metadata.items() if key != "sum")
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()


def described(metadata: Mapping[str, str], where: str) -> Description:
    """The description in the metadata of the file `where`.

    Raises:
        CheckpointError: it is not a delta file, of another format, or anything in it is not what it
            must be.
    """
    if "format" not in metadata or "tensors" not in metadata:
        raise CheckpointError(
            f"{where}: a safetensors file, but no delta", "give a file that `pa-fast encode` wrote"
        )
    if metadata["format"] not in (FORMAT, _UNSUMMED):
        found = f"delta format {quoted(metadata['format'])}, expected {_UNSUMMED} or {FORMAT}"
        raise CheckpointError(
            f"{where}: {found}", "encode the delta again, or use the pa_fast that wrote it"
        )
    expected = {
        "format",
        "store",
        "options",
        "exact",
        "lossless",
        "base",
        "instruct",
        "pa_fast",
        "tensors",
    }
    if metadata["format"] != _UNSUMMED:
        expected.add("sum")
    if metadata.keys() != expected:
        odd = quoted(min(metadata.keys() ^ expected))
        raise CheckpointError(
            f"{where}: metadata {odd} is"
            f" {'missing' if odd[1:-1] in expected else 'not of this format'}",
            _AGAIN,
        )
    for key in ("store", "options", "pa_fast"):
        if not metadata[key].isprintable() or len(metadata[key]) > 1000:
            raise CheckpointError(
                f"{where}: metadata `{key}` is not a short printable text", _AGAIN
            )
    for key in ("exact", "lossless"):
        if metadata[key] not in ("true", "false"):
            raise CheckpointError(
                f"{where}: metadata `{key}` is {quoted(metadata[key])}, expected true or false",
                _AGAIN,
            )
    tensors = parse_object(
        metadata["tensors"].encode(errors="surrogatepass"), f"{where}: metadata `tensors`"
    )
    made = Description(
        metadata["store"],
        metadata["options"],
        metadata["exact"] == "true",
        metadata["lossless"] == "true",
        _side(metadata["base"], f"{where}: metadata `base`"),
        _side(metadata["instruct"], f"{where}: metadata `instruct`"),
        metadata["pa_fast"],
        {name: _about(said, f"{where}: tensor {quoted(name)}") for name, said in tensors.items()},
    )
    if "sum" in expected and metadata["sum"] != (found := sum_of(metadata)):
        raise CheckpointError(
            f"{where}: its metadata have sum {found}, expected {quoted(metadata['sum'])}: somebody"
            " edited them",
            _AGAIN,
        )
    return made


def _side(text: str, where: str) -> Side:
    said = parse_object(text.encode(errors="surrogatepass"), where)
    if (
        said.keys() != {"content", "quick"}
        or not _is_sum(said["content"])
        or not (said["quick"] is None or _is_sum(said["quick"]))
    ):
        raise CheckpointError(
            f"{where}: {quoted(text)}, expected two fingerprints of 16 hex digits", _AGAIN
        )
    return Side(said["content"], said["quick"])


def _about(said: Any, where: str) -> About:
    def refuse(key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{where}: `{key}` is {quoted(str(said[key]))}, expected {expected}", _AGAIN
        )

    if not isinstance(said, dict) or said.keys() != About.__dataclass_fields__.keys():
        raise CheckpointError(
            f"{where}: expected an object of {', '.join(About.__dataclass_fields__)}", _AGAIN
        )
    if not isinstance(said["kind"], str) or said["kind"] not in KINDS:
        raise refuse("kind", f"one of {', '.join(KINDS)}")
    shape, ends = said["shape"], said["ends"]
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        raise refuse("shape", f"at most {MAX_DIMENSIONS} sizes")
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise refuse("shape", "fewer elements than 2^63")
    for key in ("base", "live", "via"):
        known = isinstance(said[key], str) and said[key] in FLOATS
        if not known and not (key == "via" and said[key] is None):
            raise refuse(key, f"one of {', '.join(sorted(FLOATS))}")
    if not _is_sum(said["data"]):
        raise refuse("data", "16 hex digits")
    if (
        not isinstance(ends, list)
        or len(ends) != 2
        or not all(end is None or _is_sum(end) for end in ends)
    ):
        raise refuse("ends", "two checksums of 16 hex digits")
    return About(
        said["kind"],
        tuple(shape),
        said["base"],
        said["live"],
        said["via"],
        said["data"],
        (ends[0], ends[1]),
    )


def _is_sum(value: Any) -> bool:
    return isinstance(value, str) and _SUM.fullmatch(value) is not None
