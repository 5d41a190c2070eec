"""How fast switches are here, for a model's shapes, beside what the machine can do at all, measured
in the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pa_fast.device import device_of

RELATIVE = (0.0018, 0.017, 0.044, 0.14, 0.23)
"""‖I − B‖ / ‖B‖: a DPO stage, Qwen2.5-7B, Llama-3.1-8B, Llama-3.2-3B, Gemma-2-9B."""


@dataclass(frozen=True)
class Timing:
    """One thing that was timed.

    Attributes:
        what: a ceiling, or a switch with its store.
        relative_delta: ‖I − B‖ / ‖B‖ of the synthetic pair, or None where it does not matter.
        bytes_per_weight: kept in all, the live copy included, or None for a ceiling.
        moved_bytes: read and written per run.
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
        return json.dumps(
            {**asdict(self), "rows": [{**asdict(row), "gbps": row.gbps} for row in self.rows]},
            indent=1,
        )


def measure(
    device: str = "auto",
    shape: str = "auto",
    rounds: int = 5,
    progress: Callable[[str], None] = lambda what: None,
) -> Throughput:
    """Time the machine's ceilings, and switches of synthetic bf16 weights of a model's shapes, each
    proven before it is timed.

    Args:
        device: cpu, cuda, cuda:1 or auto.
        shape: 1b, 8b, 70b, or a checkpoint folder, whose shapes count; auto: 1b on a CPU, 8b on a
            GPU. Of what is too large for the memory that is free, as many tensors as fit.
        rounds: of everything; the median counts.
        progress: told what comes next.

    Raises:
        UsageError: no such device or shape, or no tensor fits.
        WeightsError: a switch wrote other bits than the contract's.
    """
    import torch

    from pa_fast.throughput.ceilings import ceilings
    from pa_fast.throughput.shapes import fitting, shapes
    from pa_fast.throughput.switches import switches

    where = device_of(device)
    chosen = fitting(
        shapes(shape if shape != "auto" else "8b" if where.type == "cuda" else "1b"), where
    )
    generator = torch.Generator(where).manual_seed(0)
    base = {
        str(n): (
            torch.empty(size, dtype=torch.bfloat16, device=where).normal_(
                0, 0.02, generator=generator
            )
        )
        for n, size in enumerate(chosen)
    }
    live = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    progress("what the machine can do")
    rows = list(ceilings(live, base, rounds))
    for relative in RELATIVE:
        rows += switches(live, base, relative, rounds, generator, progress)
    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return Throughput(
        name,
        torch.__version__,
        sum(tensor.numel() for tensor in base.values()),
        len(base),
        tuple(rows),
    )
