"""How fast switches are here, for a model's shapes, beside what the machine can do at all, measured in the same run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.errors import UsageError

if TYPE_CHECKING:
    import torch

SHAPES = {
    "1b": (2048, 5632, 18, 32000, 512),
    "8b": (4096, 14336, 32, 128256, 1024),
    "70b": (8192, 28672, 80, 128256, 1024),
}
"""Llama's hidden size, intermediate size, layers, vocabulary, and width of keys and values."""

RELATIVE = (0.0018, 0.017, 0.044, 0.14, 0.23)
"""‖I − B‖ / ‖B‖: a DPO stage, Qwen2.5-7B, Llama-3.1-8B, Llama-3.2-3B, Gemma-2-9B."""


@dataclass(frozen=True)
class Timing:
    """One thing that was timed.

    Attributes:
        what: a ceiling, or a switch with its store.
        relative_delta: ‖I − B‖ / ‖B‖ of the synthetic pair, or None where it does not matter.
        bytes_per_weight: kept in all, the live copy included, or None for a ceiling.
        moved_bytes: per run.
        seconds: median of `rounds` runs, in turn with all others of the same pair.
        encode_s: making the delta, proofs of both ends included, or None.
    """

    what: str
    relative_delta: float | None
    bytes_per_weight: float | None
    moved_bytes: int
    seconds: float
    rounds: int
    encode_s: float | None = None

    @property
    def gbps(self) -> float:
        return self.moved_bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Throughput:
    """Everything of one run: where, of how many weights, and its rows."""

    machine: str
    torch: str
    weights: int
    tensors: int
    rows: tuple[Timing, ...]

    def to_json(self) -> str:
        """One JSON document with the fields of this class."""
        return json.dumps({**asdict(self), "rows": [{**asdict(row), "gbps": row.gbps} for row in self.rows]}, indent=1)


def measure(
    device: str = "auto", shape: str = "auto", rounds: int = 5, progress: Callable[[str], None] = lambda what: None
) -> Throughput:
    """Time dense and packed switches of synthetic bf16 weights of a model's shapes.

    Args:
        device: cpu, cuda, cuda:1 or auto.
        shape: 1b, 8b, 70b, or a checkpoint folder, whose shapes count; auto: 1b on a CPU, 8b on a GPU. Of what is too
            large for the memory that is free, as many tensors as fit.
        rounds: of everything; the median counts.
        progress: told what comes next.

    Raises:
        UsageError: no such device or shape, or no tensor fits.
    """
    import torch

    where = _device(device)
    sizes = _fitting(_sizes(shape if shape != "auto" else "8b" if where.type == "cuda" else "1b"), where)
    generator = torch.Generator(where).manual_seed(0)
    base = {
        str(n): torch.empty(size, dtype=torch.bfloat16, device=where).normal_(0, 0.02, generator=generator)
        for n, size in enumerate(sizes)
    }
    live = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    rows = list(_ceilings(live, base, where, rounds, progress))
    for relative in RELATIVE:
        rows += _switches(live, base, relative, where, rounds, generator, progress)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Throughput(name, torch.__version__, sum(sizes), len(sizes), tuple(rows))


def _switches(
    live: dict[str, torch.Tensor], base: dict[str, torch.Tensor], relative: float, where: torch.device, rounds: int,
    generator: torch.Generator, progress: Callable[[str], None],
) -> Iterator[Timing]:  # fmt: skip
    """Dense and packed switches of one pair, and dense once more, in turn."""
    import torch

    from pa_fast.live.weights import LiveWeights

    progress(f"a pair with a delta of {relative:.2%}")
    instruct = {}
    for name, tensor in base.items():
        step = torch.empty(tensor.shape, dtype=torch.float32, device=where).normal_(0, 0.02 * relative, generator=generator)
        instruct[name] = step.add_(tensor).bfloat16()
    count = sum(tensor.numel() for tensor in base.values())
    began = time.perf_counter()
    packed = LiveWeights.bind(live, base, instruct, "packed")
    _wait(where)
    encoding = time.perf_counter() - began
    progress(f"switches of a delta of {relative:.2%}")
    again = iter([k / 256 for k in range(1, 256)] * 99)
    held = packed.memory()
    seconds = {"packed": _timed(lambda: packed.set_lambda(next(again)), where, rounds)}
    packed.close()
    dense = LiveWeights.bind(live, base, instruct, "dense")
    kept = dense.memory()
    for what in ("dense", "dense, again"):
        seconds[what] = _timed(lambda: dense.set_lambda(next(again)), where, rounds)
    dense.close()
    beside = held.total_bytes - held.live_bytes
    for what, taken, moved, encode_s in (
        ("dense", kept.total_bytes, 6 * count, None),
        ("dense, again", kept.total_bytes, 6 * count, None),
        ("packed", held.total_bytes, 2 * held.live_bytes + beside, encoding),
    ):
        yield Timing(what, relative, taken / count, moved, seconds[what], rounds, encode_s)


def _ceilings(
    live: dict[str, torch.Tensor], base: dict[str, torch.Tensor], where: torch.device, rounds: int,
    progress: Callable[[str], None],
) -> Iterator[Timing]:  # fmt: skip
    """Copy, and one flat stream of two reads and a write, over as many bytes as the largest tensor has."""
    import torch

    progress("what the machine can do")
    name = max(base, key=lambda name: base[name].numel())
    b, w = base[name], live[name]
    other = b.clone()
    for what, moved, run in (
        ("copy", 2 * b.nbytes, lambda: w.copy_(b)),
        ("flat torch.lerp(out=)", 3 * b.nbytes, lambda: torch.lerp(b, other, 0.3, out=w)),
    ):
        yield Timing(what, None, None, moved, _timed(run, where, 2 * rounds), 2 * rounds)


def _timed(run: Callable[[], Any], where: torch.device, rounds: int) -> float:
    run()
    found = []
    for _ in range(rounds):
        _wait(where)
        began = time.perf_counter()
        run()
        _wait(where)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        import torch

        torch.cuda.synchronize(where)


def _device(name: str) -> torch.device:
    import torch

    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device `{name}` is not there", "write cpu, cuda, cuda:1 or auto")
    return where


def _sizes(shape: str) -> list[int]:
    """Elements of each tensor, largest matrices of all layers among them."""
    if shape not in SHAPES:
        if not Path(shape).is_dir():
            raise UsageError(f"shape `{shape}` is not known", f"write {', '.join(SHAPES)}, or a checkpoint folder")
        from pa_fast.checkpoint.reader import Checkpoint

        with Checkpoint.open(shape) as checkpoint:
            return [info.count for info in checkpoint.tensors.values() if info.count]
    hidden, intermediate, layers, vocabulary, keys = SHAPES[shape]
    layer = [hidden * hidden, keys * hidden, keys * hidden, hidden * hidden, *[intermediate * hidden] * 3, hidden, hidden]
    return [*layer * layers, vocabulary * hidden, vocabulary * hidden, hidden]


def _fitting(sizes: Sequence[int], where: torch.device) -> list[int]:
    """As many tensors, from the first on, as fit: live, base, instruct, and codes or scratch beside them."""
    import torch

    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else _available_bytes()
    room, kept = int(free * 0.8) // 10, []
    for size in sizes:
        if size <= room:
            kept.append(size)
            room -= size
    if not kept:
        raise UsageError("no tensor of these shapes fits the memory that is free", "choose a smaller --shape")
    return kept


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 16 * 2**30
