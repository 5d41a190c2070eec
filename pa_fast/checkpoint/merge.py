"""`pa-fast merge`: write W(λ) of a pair as a checkpoint folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pa_fast.base import Lambda
from pa_fast.checkpoint.config import is_tied
from pa_fast.checkpoint.content import content_sums
from pa_fast.checkpoint.folder import (
    INDEX,
    PROVENANCE,
    Companion,
    copied,
    hub_id,
    resolve,
    revision,
)
from pa_fast.checkpoint.layout import (
    ShardPlan,
    Sums,
    is_complete,
    plan_shards,
    plan_shards_like,
)
from pa_fast.checkpoint.names import Skeleton, undone
from pa_fast.checkpoint.pair import Pair, PairOptions, pair, untied_config
from pa_fast.checkpoint.provenance import (
    ChosenFrom,
    Provenance,
    SideRecord,
    as_hex,
    combine,
    merged_config,
    model_card,
)
from pa_fast.checkpoint.reader import Checkpoint, Conversion
from pa_fast.checkpoint.safetensors import quoted, torch_dtype
from pa_fast.checkpoint.streaming import (
    MergeSpec,
    TensorMerge,
    check_finite,
    chunk_sum,
    dtype_name,
    live_dtype,
    merge_chunk_,
    merge_summed_,
    over_chunks,
)
from pa_fast.checkpoint.vocabulary import untrained_rows, with_vocabulary_sizes
from pa_fast.checkpoint.writer import OutputFolder, ShardFile
from pa_fast.errors import EngineError, OutputError
from pa_fast.files import path_of
from pa_fast.rounding import Rounding
from pa_fast.rules import RuleLike
from pa_fast.units import parse_bytes

if TYPE_CHECKING:
    import torch


A = TypeVar("A")
T = TypeVar("T")


def parallel_files(
    work: Callable[[ThreadPoolExecutor, A], T],
    items: Sequence[A],
    at_once: int,
    ended: threading.Event,
) -> list[T]:
    """Return `work(pool, item)` of every item, in order. `at_once` items run at a time, each with
    its share of the cores.

    Args:
        ended: set when an item fails or the caller is interrupted. Running work must check it, and
            raise if it is set.

    Raises:
        BaseException: the error of the first item that failed, once all have ended.
    """
    from pa_kernels.cores import cores, threads

    if at_once < 2:
        with cores() as pool:
            return [work(pool, item) for item in items]
    queue, done = deque(enumerate(items)), dict[int, T]()
    failed: list[BaseException] = []

    def fill(pool: ThreadPoolExecutor) -> None:
        while queue and not ended.is_set():
            try:
                index, item = queue.popleft()
                done[index] = work(pool, item)
            except BaseException as error:
                failed.append(error)
                ended.set()

    with ExitStack() as stack:
        pools = [stack.enter_context(cores(at_once)) for _ in range(at_once)]
        fillers = stack.enter_context(threads(at_once))
        stack.callback(ended.set)  # an interrupt of the wait
        wait([fillers.submit(fill, pool) for pool in pools])
    if failed:
        raise failed[0]
    return [done[index] for index in range(len(items))]


# --- live tensors


class LiveTensors:
    """The weights of a live transformers model under the names and in the layout of the merge of
    `pair`.

    Raises:
        EngineError: a tensor of the merge that follows λ is missing in the model, or has another
            shape there.
    """

    def __init__(self, model: Any, pair: Pair):
        skeleton = Skeleton(model)
        self._direct: dict[str, torch.Tensor] = {}
        self._converted: dict[str, Conversion] = {}
        for conversion in undone(pair.instruct, skeleton, self):
            self._converted |= dict.fromkeys(conversion.names, conversion)
        placed = skeleton.trace(name for name in pair.names if name not in self._converted).placed
        for target, parts in placed.items():
            self._direct[parts[0].key] = skeleton.tensors[target].detach()
        self._tensors = skeleton.tensors
        unplaced = self._without_place(pair)
        for name in pair.names:
            if pair.is_lerped(name) and name not in self._converted and name not in unplaced:
                own = self._direct.get(name)
                if own is None or tuple(own.shape) != pair.shapes[name]:
                    actual = "no tensor" if own is None else f"shape {list(own.shape)}"
                    raise EngineError(
                        f"tensor {quoted(name)} of the merge: {actual} in the model, expected shape"
                        f" {list(pair.shapes[name])}",
                        "save a model that pa_fast.load made of this pair",
                    )

    @staticmethod
    def _without_place(pair: Pair) -> frozenset[str]:
        """Return the tensors of the merge that no model of this pair holds, according to its class,
        not to the given model."""
        described = Skeleton.of(pair.instruct.config, pair.base.config)
        if described is None:
            return frozenset()
        return frozenset(described.trace(pair.names).unplaced)

    def tensor_in_memory(self, name: str) -> torch.Tensor:
        """Return the model's tensor `name`, in host memory."""
        return self._tensors[name].detach().cpu()

    def chunk(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return elements `start` to `stop` of the flattened tensor `name` of the merge; None if
        the model has no such tensor.

        Numerics: exact.
        """
        if name in self._converted:
            return self._converted[name].elements(name, start, stop)
        tensor = self._direct.get(name)
        return None if tensor is None else tensor.view(-1)[start:stop].cpu()


# --- merge

_LARGE_BYTES = 64 * 2**20  # smaller files are filled one after another: a kill then loses the least
_AT_ONCE = 8
_PASSES = 16
"""Bytes that are merged once are worth loading compiled loops for where so many times fewer are
that follow λ: from 1 GB on. Of 1.9 GB torch takes 2.5 s more on 2 slow cores, and loading 0.7."""
_FAR = 4.0  # |λ| above it is noted


@dataclass(frozen=True)
class MergeReport:
    """A finished merge: `bytes` of its weight files, and `seconds` for all of it, syncing included.

    `resumed` of its `shards` were already complete, from an unfinished run of the same merge.
    """

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
    resumed: int = 0


def merge(
    base: str | Path,
    instruct: str | Path,
    lam: Lambda | float | str,
    out: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    rounding: str | Rounding = "nearest",
    seed: int | None = None,
    rule: RuleLike | None = None,
    max_shard_size: str | int | None = None,
    extra_rows: str = "instruct",
    one_sided: str | None = None,
    ignore_config: Iterable[str] = (),
    strip_prefix: str | Iterable[str] = (),
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    model: Any = None,
    store: str | None = None,
    chosen_from: ChosenFrom | None = None,
) -> MergeReport:
    """Write W(λ) = B + λ (I − B) as a checkpoint folder `out`, which appears complete or not at
    all.

    A killed run leaves its complete weight files hidden beside `out`. The next run with the same
    arguments and sources verifies them and goes on from there; any other run starts afresh.

    Args:
        base, instruct: folders or hub ids `org/name[@revision]`.
        lam: any finite λ; a string may be a fraction (`1/3`).
        dtype: dtype of all merged tensors: bfloat16, float16, float32, or `auto` for that of each
            tensor in the instruct checkpoint.
        rounding: `nearest`, or `stochastic`: by noise of (seed, tensor name, element), so that the
            weights follow λ on average where nearest loses updates of less than half a unit in the
            last place.
        seed: seed of stochastic rounding, 0 to 2³² − 1; 0 by default.
        rule: rule for the λ of each tensor, with `lam` as the swept λ: a `LambdaRule`, its rows, or
            a YAML file of them.
        max_shard_size: largest weight file, bytes or text such as 5GB; None cuts files as the
            base's are.
        extra_rows, one_sided, ignore_config, strip_prefix: see `PairOptions`.
        allow_nonfinite: let NaN and infinite weights pass.
        overwrite: replace a checkpoint folder at `out`, if it holds nothing else, once the new one
            is complete.
        progress: called with (bytes written, bytes in all) during the merge.
        model: a transformers model of this pair. Its weights are written as they are; `lam` and the
            others describe them; see `LambdaModel.save`. A tensor that the model has in a narrower
            dtype than the merge is written as the merge, if it holds the merge rounded to that.
        store: the store of the delta of `model`, if it is lossy: recorded in pa_fast.json and in
            the model card.
        chosen_from: the run whose answer is `lam`, as `best_of` returns it: recorded there too.

    Example:
        report = pa_fast.merge("base", "instruct", 0.6, "merged")
        report.tensors, report.bytes
        pa_fast.merge("base", "instruct", "1/3", "third", dtype="bfloat16")

    Numerics: the contract of `pa_kernels.lerp_`: fp32 arithmetic, one rounding. λ = 0 and 1 give
        the sources' bits if their dtype is the output's. Live weights with the same λ, rule,
        rounding and seed have the same bits.
    Cost: one pass over both checkpoints, fingerprints included; memory of a few chunks (2^20
    elements each) per core.

    Raises:
        UsageError: λ, dtype, rounding, seed, shard size, policy or rule is not valid, or the rule
            does not fit the names.
        CheckpointError, PairError: before any output exists.
        DataError: non-finite or unequal integer weights, or a file that changed or cannot be read;
            nothing is left behind.
        OutputError: `out` is not empty, is being written, is a source or the target of a link in
            one, or does not fit on the disk.
    """
    began = time.perf_counter()
    spec = MergeSpec.of(lam, rounding, seed, rule)
    options = PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix)
    dtype = dtype_name(dtype)
    path_of(out, "out")
    shard_bytes = None if max_shard_size is None else parse_bytes(str(max_shard_size))
    with (
        Checkpoint.open(resolve(base)) as b,
        Checkpoint.open(resolve(instruct)) as i,
    ):
        companions = copied(i.folder)
        paired = pair(b, i, options)
        merges = spec.tensor_merges(paired)
        notes = paired.notes + untrained_rows(b, i) + spec.notes(paired) + _far(spec.lam)
        shards = _plan(paired, dtype, shard_bytes)
        live = None if model is None else LiveTensors(model, paired)
        total = sum(slot.stop - slot.start for plan in shards for slot in plan.slots)
        stream = _Stream(paired, merges, not allow_nonfinite, total, progress, live)
        weight_bytes = sum(plan.size_bytes for plan in shards)
        need_bytes = weight_bytes + sum(companion.size_bytes for companion in companions)
        sides = _source(base, paired.base), _source(instruct, paired.instruct)
        provenance = Provenance(
            *sides,
            spec,
            dtype,
            options,
            paired.tied,
            paired.kept,
            paired.notes,
            store,
            chosen_from,
        )
        job = None if live is not None else _job(paired, shards, provenance, allow_nonfinite)
        read = (b.folder, i.folder)
        with OutputFolder(out, need_bytes, overwrite=overwrite, job=job, sources=read) as folder:
            sums, resumed = _fill_all(folder, shards, stream)
            b.check_all_unchanged()
            i.check_all_unchanged()
            provenance = dataclasses.replace(
                provenance,
                base=_summed(
                    provenance.base, paired.base, {name: one.base for name, one in sums.items()}
                ),
                instruct=_summed(
                    provenance.instruct,
                    paired.instruct,
                    {name: one.instruct for name, one in sums.items()},
                ),
            )
            _write_companions(folder, paired, companions, shards, provenance, str(out))
            folder.commit()
    return MergeReport(
        out=str(out),
        lam=spec.lam.key,
        dtype=dtype,
        tensors=len(paired.names),
        parameters=sum(paired.count(name) for name in paired.names if paired.is_lerped(name)),
        shards=len(shards),
        bytes=weight_bytes,
        base_fingerprint=provenance.base.content_fingerprint,
        instruct_fingerprint=provenance.instruct.content_fingerprint,
        notes=notes,
        seconds=time.perf_counter() - began,
        resumed=resumed,
    )


def _far(lam: Lambda) -> tuple[str, ...]:
    """Return a note where λ is so far from both sides that it is likely a slip, such as 60 for
    60 %."""
    if abs(lam) <= _FAR:
        return ()
    return (f"λ = {lam.key} is far outside [0, 1], from base to instruct: was it meant?",)


def _fill_all(
    folder: OutputFolder, shards: Sequence[ShardPlan], stream: _Stream
) -> tuple[dict[str, Sums], int]:
    """Fill the weight files that are not complete. Return the checksums of all tensors, and the
    number of files that were already complete."""
    import torch  # only once nothing in the headers speaks against it
    from pa_kernels import compiled

    # each byte is summed once, where a sweep comes back to it at every λ
    compiled.prepare(sum(plan.size_bytes for plan in shards) // _PASSES)
    resumed: list[str] = []

    def one(pool: ThreadPoolExecutor, plan: ShardPlan) -> dict[str, Sums]:
        logged = folder.complete.get(plan.file)
        if logged is not None and is_complete(pool, folder.path / plan.file, plan, logged):
            stream.skip(plan)
            resumed.append(plan.file)
            return logged
        with folder.shard(plan) as file:
            return stream.fill(pool, plan, file)

    large = sum(plan.size_bytes >= _LARGE_BYTES for plan in shards)
    filled = parallel_files(
        one, shards, min(large, torch.get_num_threads(), _AT_ONCE), stream.ended
    )
    return {name: part for sums in filled for name, part in sums.items()}, len(resumed)


class _Stream:
    """Merge of tensors into open output files. Sums of the output and of both sources are
    summed while their bytes are in cache.

    Several files may be filled at once. Once `ended` is set, each stops at its next chunk.
    """

    def __init__(
        self,
        pair: Pair,
        merges: Mapping[str, TensorMerge],
        finite: bool,
        total: int,
        progress: Callable[[int, int], None] | None,
        live: LiveTensors | None,
    ):
        self._pair = pair
        self._merges = merges
        self._finite = finite
        self._total = total
        self._live = live
        self._done = 0
        self._progress = progress
        self._turn = threading.Lock()
        self.ended = threading.Event()

    def fill(self, pool: ThreadPoolExecutor, plan: ShardPlan, file: ShardFile) -> dict[str, Sums]:
        """Merge the tensors of `plan` into `file`, and return their checksums, which are also set
        as `file.sums`."""
        import torch
        from pa_kernels.cores import Scratch

        dtypes = {slot.name: torch_dtype(slot.dtype) for slot in plan.slots}
        totals = {slot.name: [0, 0, 0] for slot in plan.slots}
        scratch = Scratch()

        def one(
            name: str, start: int, stop: int, base: torch.Tensor, instruct: torch.Tensor
        ) -> tuple[int, list[int]]:
            out = scratch.take("out", stop - start, dtypes[name])
            tensor_merge = self._merges.get(name)
            held = (
                None
                if self._live is None or tensor_merge is None
                else self._live.chunk(name, start, stop)
            )
            total: int | None = None
            if held is None and self._finite:
                total = merge_summed_(out, base, instruct, tensor_merge, start)
            elif held is None:
                merge_chunk_(out, base, instruct, tensor_merge, start)
            elif held.dtype in (out.dtype, torch.float32):
                # a wider live tensor holds what is already rounded to this dtype
                out.copy_(held)
            else:
                merge_chunk_(out, base, instruct, tensor_merge, start)
                _check_held(name, held, out)
            if self._finite and tensor_merge is not None:
                check_finite(self._pair, name, tensor_merge.lam, out, base, instruct, start)
            file.write(name, start, out)
            own = [
                chunk_sum(self._pair.own_part(side, name, start, part), start)
                for side, part in (("base", base), ("instruct", instruct))
            ]
            return out.nbytes, [chunk_sum(out, start) if total is None else total, *own]

        for name, (written, parts) in over_chunks(pool, self._pair, dtypes, one):
            totals[name] = [(total + part) % 2**64 for total, part in zip(totals[name], parts)]
            file.written(written)
            self._advance(written)
        file.sums = {name: Sums(*total) for name, total in totals.items()}
        return file.sums

    def skip(self, plan: ShardPlan) -> None:
        """Count the tensors of `plan` as done."""
        self._advance(sum(slot.stop - slot.start for slot in plan.slots))

    def _advance(self, count: int) -> None:
        with self._turn:
            if self.ended.is_set():
                raise OutputError(
                    "another file of the merge failed", "see what was said of that one"
                )
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


def _check_held(name: str, held: torch.Tensor, merged: torch.Tensor) -> None:
    """Refuse a live tensor of a narrower dtype than the merge that is not the merge rounded to that
    dtype.

    Raises:
        EngineError: naming the tensor.
    """
    expected = merged.to(held.dtype)
    same = (held == expected) | (held.isnan() & expected.isnan())
    if not bool(same.all()):
        live, stored = (str(t.dtype).removeprefix("torch.") for t in (held, merged))
        raise EngineError(
            f"tensor {quoted(name)} is {live} in the model and {stored} in the merge, and does not"
            " hold the merge rounded to that",
            "merge the two folders, or write the model with model.save_pretrained",
        )


def _plan(pair: Pair, dtype: str, shard_bytes: int | None) -> list[ShardPlan]:
    rows = [(n, live_dtype(pair, n, dtype), pair.shapes[n], pair.count(n)) for n in pair.names]
    if shard_bytes is not None:
        return plan_shards(rows, shard_bytes)
    positions = {
        file: position
        for position, file in enumerate(sorted({info.file for info in pair.base.tensors.values()}))
    }
    files = {name: pair.stored("base", name).file for name in pair.names}
    return plan_shards_like(
        rows, {name: positions[file] for name, file in files.items() if file in positions}
    )


def _job(pair: Pair, shards: list[ShardPlan], provenance: Provenance, allow_nonfinite: bool) -> str:
    """Return 16 hex digits over everything that decides the bytes of the weight files, and over the
    file times of the sources."""
    plans = [(plan.file, plan.header) for plan in shards]
    provenance = dataclasses.replace(provenance, chosen_from=None)
    parts = (provenance.to_json(), pair.base.state(), pair.instruct.state(), plans, allow_nonfinite)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _source(spec: str | Path, checkpoint: Checkpoint) -> SideRecord:
    """Describe one side, without its content fingerprint, which takes a pass over its bytes."""
    return SideRecord(str(spec), revision(checkpoint.folder), checkpoint.quick_fingerprint(), "")


def _summed(source: SideRecord, seen: Checkpoint, sums: Mapping[str, int]) -> SideRecord:
    """Return `source` with the fingerprint of its files. `seen` gave tensors to the merge, whose
    checksums are `sums`.

    Cost: reads the tensors that did not go into the merge unchanged: those converted or left out.
    """
    known = {key: value for name, value in sums.items() if (key := seen.own_name(name)) is not None}
    rest = [info for name, info in seen.own.tensors.items() if name not in known]
    more = content_sums(
        lambda info, start, stop, out: seen.own.chunk(info.name, start, stop, out), rest
    )
    known |= {info.name: value for info, value in more.items()}
    return dataclasses.replace(source, content_fingerprint=as_hex(combine(known)))


def _write_companions(
    folder: OutputFolder,
    pair: Pair,
    companions: list[Companion],
    shards: list[ShardPlan],
    provenance: Provenance,
    out: str,
) -> None:
    """Write all files but the weights; config.json last, so that no loader accepts an unfinished
    folder."""
    source = pair.instruct.folder
    for companion in companions:
        folder.copy(companion)
    if len(shards) > 1:
        weight_map = {slot.name: plan.file for plan in shards for slot in plan.slots}
        total = sum(slot.stop - slot.start for plan in shards for slot in plan.slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        folder.write(INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
    hub_ids = [name for side in (pair.base, pair.instruct) if (name := hub_id(side.folder))]
    folder.write("README.md", model_card(provenance, out, hub_ids).encode())
    own = ["README.md", "config.json", PROVENANCE, *([INDEX] if len(shards) > 1 else [])]
    files = sorted(
        [*own, *(plan.file for plan in shards), *(companion.name for companion in companions)]
    )
    folder.write(PROVENANCE, provenance.to_json(files).encode())
    text, config = (source / "config.json").read_bytes(), _config(pair)
    if config != pair.instruct.config:
        text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    folder.write("config.json", merged_config(text, config, provenance.dtype))


def _config(pair: Pair) -> dict[str, Any]:
    """Return instruct's configuration, corrected for the merged tensors: a head of its own, and
    their number of vocabulary rows."""
    config = pair.instruct.config
    if pair.is_untied and is_tied(config) is not False:
        config = untied_config(config)
    if not config.get("architectures") and pair.base.config.get("architectures"):
        config = {**config, "architectures": pair.base.config["architectures"]}
    own = {name: pair.stored("instruct", name).shape for name in pair.names}
    return with_vocabulary_sizes(
        config, {own[n][0]: shape[0] for n, shape in pair.shapes.items() if shape != own[n]}
    )
