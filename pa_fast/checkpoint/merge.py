"""`pa-fast merge`: W(λ) of a pair as a Hugging Face folder, streamed from mapped files into mapped files."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.base import Lambda
from pa_fast.checkpoint.card import PROVENANCE, Provenance, Source, merged_config, model_card
from pa_fast.checkpoint.fingerprint import as_hex, combine
from pa_fast.checkpoint.layout import ShardPlan, plan_shards
from pa_fast.checkpoint.pairing import Pair, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.rows import with_vocabulary_sizes
from pa_fast.checkpoint.shards import INDEX
from pa_fast.checkpoint.source import resolve, revision
from pa_fast.checkpoint.streaming import check_dtype, check_finite, live_dtype, merge_chunk_, over_chunks
from pa_fast.checkpoint.tying import untied_config
from pa_fast.checkpoint.untrained import untrained_rows
from pa_fast.checkpoint.writer import OutputFolder, ShardFile, output_errors
from pa_fast.errors import OutputError
from pa_fast.units import parse_bytes

if TYPE_CHECKING:
    import torch

# weights and training state of any kind: the merge has its own
_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl",
               ".pickle", ".npz", ".tflite")  # fmt: skip
_WRITTEN = {"config.json", "README.md", PROVENANCE}


@dataclass(frozen=True)
class MergeReport:
    """A finished merge. `bytes` and `seconds` are what was written and how long all of it took, syncing included."""

    out: str
    lam: str
    dtype: str
    tensors: int
    parameters: int
    shards: int
    bytes: int
    base_fingerprint: str
    instruct_fingerprint: str
    notes: tuple[str, ...]
    seconds: float


def merge(
    base_dir: str | Path,
    instruct_dir: str | Path,
    lam: Lambda | float | str,
    out: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    extra_rows: str = "instruct",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write W(λ) = B + λ (I − B) as a checkpoint folder `out`, which appears whole or not at all.

    Args:
        base_dir, instruct_dir: folders or hub ids `org/name[@revision]`.
        lam: any finite λ; a string may be a fraction (`1/3`).
        dtype: of all merged tensors: bfloat16, float16, float32, or `auto`: each tensor's in the instruct checkpoint.
        max_shard_size: bytes, or text such as 5GB.
        extra_rows: vocabulary rows that one side alone has are kept as they are (`instruct`) or refused (`refuse`).
        allow_nonfinite: let NaN and infinite weights pass.
        overwrite: replace a checkpoint folder at `out` once the new one is complete.
        progress: called with (bytes written, bytes in all) as data stream.

    Numerics: the contract of `pa_kernels.lerp_`: fp32 arithmetic, one rounding; λ = 0 and 1 are the sources' bits where
        their dtype is the output's.
    Cost: one pass over both checkpoints, fingerprints included; anonymous memory of a few chunks (2^20 elements each).

    Raises:
        UsageError: λ, dtype, shard size or policy is no such thing.
        CheckpointError, PairError: before any output exists.
        DataError: non-finite or unequal integer weights, or a file that changed; nothing is left behind.
        OutputError: `out` is not empty, being written, a source, or does not fit on the disk.
    """
    began = time.perf_counter()
    lam = Lambda(lam)
    check_dtype(dtype)
    shard_bytes = parse_bytes(str(max_shard_size))
    with Checkpoint.open(resolve(base_dir)) as base, Checkpoint.open(resolve(instruct_dir)) as instruct:
        found = pair(base, instruct, extra_rows)
        notes = found.notes + untrained_rows(base, instruct)
        _check_apart(Path(out), found)
        shards = _plan(found, dtype, shard_bytes)
        stream = _Stream(found, lam, not allow_nonfinite, sum(s.stop - s.start for p in shards for s in p.slots), progress)
        need_bytes = sum(plan.size_bytes for plan in shards)
        from pa_kernels.cores import cores  # torch: only once nothing in the headers speaks against it

        with OutputFolder(out, need_bytes, overwrite=overwrite) as folder, cores() as pool:
            for plan in shards:
                with folder.shard(plan) as file:
                    for slot in plan.slots:
                        stream.tensor(pool, slot.name, file)
            provenance = Provenance(
                base=_source(base_dir, base, stream.base_sums),
                instruct=_source(instruct_dir, instruct, stream.instruct_sums),
                lam=lam.key,
                dtype=dtype,
            )
            _write_companions(folder, found, shards, provenance, str(out))
            folder.commit()
    return MergeReport(
        out=str(out),
        lam=lam.key,
        dtype=dtype,
        tensors=len(found.names),
        parameters=sum(found.count(name) for name in found.names if found.is_lerped(name)),
        shards=len(shards),
        bytes=need_bytes,
        base_fingerprint=provenance.base.content_fingerprint,
        instruct_fingerprint=provenance.instruct.content_fingerprint,
        notes=notes,
        seconds=time.perf_counter() - began,
    )


class _Stream:
    """Merges tensors into open output files, and sums the sources' checksums while their bytes are in cache."""

    def __init__(self, pair: Pair, lam: Lambda, finite: bool, total: int, progress: Callable[[int, int], None] | None):
        self._pair = pair
        self._lam = float(lam)
        self._finite = finite
        self._total = total
        self._done = 0
        self._progress = progress
        self.base_sums: dict[str, int] = {}
        self.instruct_sums: dict[str, int] = {}

    def tensor(self, pool: ThreadPoolExecutor, name: str, file: ShardFile) -> None:
        checked = self._finite and self._pair.is_lerped(name)

        def one(start: int, stop: int, base: torch.Tensor, instruct: torch.Tensor) -> tuple[int, int, int]:
            out = file.chunk(name, start, stop)
            merge_chunk_(out, base, instruct, self._lam)
            if checked:
                check_finite(self._pair, name, self._lam, out, base, instruct)
            own = self._pair.own_part("base", name, start, base), self._pair.own_part("instruct", name, start, instruct)
            return out.nbytes, _sum(own[0], start), _sum(own[1], start)

        self.base_sums[name] = self.instruct_sums[name] = 0
        for written, base_sum, instruct_sum in over_chunks(pool, self._pair, name, one):
            self.base_sums[name] += base_sum
            self.instruct_sums[name] += instruct_sum
            file.written(written)
            self._done += written
            if self._progress:
                self._progress(self._done, self._total)


def _sum(chunk: torch.Tensor, start: int) -> int:
    from pa_kernels.checksum import CHUNK_BYTES, piece_checksum

    return piece_checksum(chunk, start * chunk.element_size() // CHUNK_BYTES)


def _plan(pair: Pair, dtype: str, shard_bytes: int) -> list[ShardPlan]:
    return plan_shards(((n, live_dtype(pair, n, dtype), pair.shapes[n], pair.count(n)) for n in pair.names), shard_bytes)


def _source(spec: str | Path, checkpoint: Checkpoint, sums: dict[str, int]) -> Source:
    return Source(str(spec), revision(checkpoint.folder), checkpoint.quick_fingerprint(), as_hex(combine(sums)))


def _check_apart(out: Path, pair: Pair) -> None:
    target = Path(os.path.realpath(out.expanduser()))
    for side in (pair.base, pair.instruct):
        source = Path(os.path.realpath(side.folder))
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(f"{out}: is, holds or lies in the source {side.folder}", "choose another --out")


def _write_companions(folder: OutputFolder, pair: Pair, shards: list[ShardPlan], provenance: Provenance, out: str) -> None:
    """Everything but weights; config.json last, so that an unfinished folder loads nowhere."""
    source = pair.instruct.folder
    for path in sorted(source.iterdir()):
        if not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED) and path.name not in _WRITTEN and path.is_file():
            with output_errors(folder.path / path.name):
                shutil.copyfile(path, folder.path / path.name)
    if len(shards) > 1:
        weight_map = {slot.name: plan.file for plan in shards for slot in plan.slots}
        total = sum(slot.stop - slot.start for plan in shards for slot in plan.slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        folder.write(INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
    folder.write("README.md", model_card(provenance, out).encode())
    folder.write(PROVENANCE, provenance.to_json().encode())
    text, config = (source / "config.json").read_bytes(), _config(pair)
    if config != pair.instruct.config:
        text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    folder.write("config.json", merged_config(text, config, provenance.dtype))


def _config(pair: Pair) -> dict[str, Any]:
    """Instruct's configuration, true of the merged tensors: with a head of its own and as many rows as they have."""
    config = untied_config(pair.instruct.config) if pair.tied else pair.instruct.config
    own = {name: pair.stored("instruct", name).shape for name in pair.names}
    return with_vocabulary_sizes(config, {own[n][0]: shape[0] for n, shape in pair.shapes.items() if shape != own[n]})
