"""The weight files that a merge writes: their layout, the log of complete files in an unfinished
folder, and checks of a folder that they may replace.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pa_fast import files
from pa_fast.checkpoint.folder import PROVENANCE, SINGLE, TEMPLATES
from pa_fast.checkpoint.provenance import as_hex
from pa_fast.checkpoint.safetensors import (
    DTYPE_BITS,
    TensorInfo,
    WeightFile,
    quoted,
    read_object,
    torch_dtype,
)
from pa_fast.checkpoint.streaming import chunk_sum, cuts, in_order
from pa_fast.errors import CheckpointError, OutputError, PaFastError

# the header is padded so that data start on a cache line, and tensors stay aligned to their dtype
_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """Position of one tensor in an output file: bytes `start` to `stop` from the beginning of the
    file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name, header bytes (length word included) and tensors in byte order."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        return self.slots[-1].stop if self.slots else len(self.header)


TensorRow = tuple[str, str, tuple[int, ...], int]
"""Name, safetensors dtype, shape and elements of a tensor."""


def plan_shards(tensors: Iterable[TensorRow], max_shard_bytes: int) -> list[ShardPlan]:
    """Cut (name, dtype, shape, elements) into files of at most `max_shard_bytes` of data, in the
    given order.

    A larger tensor gets a file of its own. Inside a file wider dtypes come first, so that all are
    aligned.
    """
    groups: list[list[TensorRow]] = [[]]
    filled = 0
    for row in tensors:
        size = _size(row)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += size
    return _numbered(groups)


def plan_shards_like(tensors: Iterable[TensorRow], files: Mapping[str, int]) -> list[ShardPlan]:
    """Cut tensors as another checkpoint is: `files` has the index of each tensor's file in it. A
    tensor that it lacks goes into the last file.

    Inside a file wider dtypes come first, so that all are aligned; otherwise the order is that of
    `tensors`.
    """
    last = max(files.values())
    groups: dict[int, list[TensorRow]] = {}
    for row in tensors:
        groups.setdefault(files.get(row[0], last), []).append(row)
    return _numbered([groups[index] for index in sorted(groups)])


def _size(row: TensorRow) -> int:
    return row[3] * DTYPE_BITS[row[1]] // 8


def _numbered(groups: list[list[TensorRow]]) -> list[ShardPlan]:
    total = len(groups)
    names = (
        [SINGLE]
        if total == 1
        else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    )
    return [_plan(file, group) for file, group in zip(names, groups)]


def _plan(file: str, group: list[TensorRow]) -> ShardPlan:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(group, key=lambda tensor: -DTYPE_BITS[tensor[1]])
    offset = 0
    for name, dtype, shape, count in ordered:
        size = count * DTYPE_BITS[dtype] // 8
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    slots, offset = [], len(header)
    for name, dtype, shape, count in ordered:
        size = count * DTYPE_BITS[dtype] // 8
        slots.append(Slot(name, dtype, shape, offset, offset + size))
        offset += size
    return ShardPlan(file, header, tuple(slots))


# --- replacing

# files that save_pretrained of models, tokenizers and processors, the end of a Trainer, and the hub
# leave in a model's folder
_KNOWN = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model[-.]*.safetensors",
    "consolidated*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    ".gitattributes",
    PROVENANCE,
)
# folder → the only files that may be in it
_KNOWN_FOLDERS = {TEMPLATES: "*.jinja"}


def check_replaceable(folder: Path) -> None:
    """Refuse to replace `folder` unless it is a checkpoint and holds only files of a checkpoint.

    Files of a checkpoint are those that `save_pretrained`, the end of a Trainer and the hub write,
    and those that the folder's own pa_fast.json lists. The state of a training (`optimizer.pt`,
    `checkpoint-500/`) is not among them.

    Raises:
        OutputError: it is not a checkpoint, or holds something else, which is named.
    """
    names = sorted(os.listdir(folder))
    listed = _listed(folder)
    if listed is None and not _is_model_config(folder):
        raise OutputError(
            f"{folder}: not empty: found {', '.join(names[:3])}, which is no checkpoint",
            "only a checkpoint is replaced: remove the folder yourself, or choose another --out",
        )
    foreign = foreign_names(folder)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{folder}: holds {', '.join(map(quoted, foreign[:3]))}{more}, which no checkpoint"
            " consists of",
            "replacing the folder would remove that: move it elsewhere, or choose another --out",
        )


def foreign_names(folder: Path) -> list[str]:
    """Return the names in `folder` that are not of a checkpoint."""
    listed = _listed(folder) or frozenset()
    return [name for name in sorted(os.listdir(folder)) if not _is_known(folder / name, listed)]


def check_apart(outputs: Iterable[Path], sources: Iterable[Path]) -> None:
    """Refuse outputs that are, hold or lie in a source folder, or hold the target of one of its
    links.

    Args:
        outputs: the folder that is written, and its working folders.
        sources: checkpoint folders and files that are read.

    Raises:
        OutputError: naming output and source.
    """
    real_paths = [(output, Path(os.path.realpath(output))) for output in outputs]
    for source in sources:
        root = Path(os.path.realpath(source))
        entries = sorted(source.iterdir()) if source.is_dir() else []
        for output, real_path in real_paths:
            if real_path == root or real_path in root.parents or root in real_path.parents:
                raise OutputError(
                    f"{output}: is, holds or lies in the source {source}", "choose another --out"
                )
            for entry in entries:
                if real_path in Path(os.path.realpath(entry)).parents:
                    raise OutputError(
                        f"{output}: holds what {entry} of a source is a link to",
                        "choose another --out",
                    )


def _listed(folder: Path) -> frozenset[str] | None:
    """Return the file names that the pa_fast.json of `folder` lists; None if it has no such file of
    a merge."""
    document = _object(folder / PROVENANCE)
    if not document.keys() >= {"format", "lambda", "base", "instruct"}:
        return None
    files = document.get("files", [])
    return (
        frozenset(name for name in files if isinstance(name, str))
        if isinstance(files, list)
        else frozenset()
    )


def _is_model_config(folder: Path) -> bool:
    document = _object(folder / "config.json")
    return isinstance(document.get("model_type"), str) or isinstance(
        document.get("architectures"), list
    )


def _object(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path) if os.path.lexists(path) else {}
    except CheckpointError:
        return {}


def _is_known(path: Path, listed: frozenset[str]) -> bool:
    mode = os.lstat(path).st_mode
    if stat.S_ISDIR(mode):
        if path.name == ".cache":
            return os.listdir(path) == ["huggingface"]
        pattern = _KNOWN_FOLDERS.get(path.name)
        return pattern is not None and all(
            fnmatch.fnmatchcase(one.name, pattern) and not one.is_dir() for one in path.iterdir()
        )
    return path.name in listed or any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _KNOWN)


# --- resume


@dataclass(frozen=True)
class Sums:
    """Sums of one tensor (`pa_kernels.checksum`): of the bytes written, and of both
    sources."""

    written: int
    base: int
    instruct: int


class ShardLog:
    """Log of the complete shards in the unfinished `folder` of a job, so that another run of the
    same job need not write them again.

    The file `.pa_fast.shards.jsonl` has one line per complete shard, synced after the shard. The
    three numbers are `Sums` in hex: the shard is verified by the first, and content fingerprints
    are computed from the others.

        {"job": "…", "file": "model-00001-of-00003.safetensors",
         "tensors": {name: [written, base, instruct]}}

    Args:
        job: any text; only runs with equal ones continue each other.
    """

    def __init__(self, folder: Path, job: str):
        self.file = folder / ".pa_fast.shards.jsonl"
        self._job = job

    def begin(self) -> None:
        """Create the file, empty: the next run knows by it that pa_fast made the folder."""
        os.close(files.open_own(self.file, os.O_WRONLY | os.O_CREAT))

    def read(self) -> dict[str, dict[str, Sums]]:
        """Return file → checksums by tensor. Lines that a kill tore, or of another job, are
        skipped."""
        try:
            lines = files.read_own(self.file).splitlines()
        except (OSError, OutputError):
            return {}
        shards = {}
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["job"] == self._job:
                    shards[str(entry["file"])] = {
                        str(name): Sums(*(int(value, 16) for value in sums))
                        for name, sums in entry["tensors"].items()
                    }
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
        return shards

    def add(self, shard: str, sums: Mapping[str, Sums]) -> None:
        """Record that `shard`, which is on the disk under its final name, is complete."""
        tensors = {
            name: [as_hex(one.written), as_hex(one.base), as_hex(one.instruct)]
            for name, one in sums.items()
        }
        line = json.dumps({"job": self._job, "file": shard, "tensors": tensors})
        with os.fdopen(
            files.open_own(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab"
        ) as file:
            # begins with a line break, in case the line before is torn
            file.write(f"\n{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def is_complete(
    pool: ThreadPoolExecutor, path: Path, plan: ShardPlan, sums: Mapping[str, Sums]
) -> bool:
    """Return whether `path` has the size, the header and every byte that `plan` and `sums`
    describe.

    Cost: one pass over the file.
    """
    from pa_kernels.cores import Scratch

    if sums.keys() != {slot.name for slot in plan.slots}:
        return False
    infos = {
        s.name: TensorInfo(s.name, s.dtype, s.shape, path, s.start, s.stop) for s in plan.slots
    }
    scratch = Scratch()
    try:
        file = WeightFile(path, plan.size_bytes)
        try:

            def one(name: str, start: int, stop: int) -> int:
                info = infos[name]
                out = scratch.take("out", stop - start, torch_dtype(info.dtype))
                return chunk_sum(file.read(info, start, stop, out), start)

            if file.sample(0, len(plan.header)) != plan.header:
                return False
            totals = dict.fromkeys(infos, 0)
            pieces = ((name, *cut) for name, info in infos.items() for cut in cuts(info.count))
            for name, value in in_order(pool, one, pieces):
                totals[name] += value
        finally:
            file.close()
    except PaFastError:
        return False
    return all(totals[name] % 2**64 == one.written for name, one in sums.items())
