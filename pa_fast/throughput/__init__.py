"""Speed of switches on this machine, for a model's shapes, beside what the machine can do at all,
measured in the same run: `pa-fast bench`. `harness` is also what `make bench` and `make gpu` time
with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.device import device_of

if TYPE_CHECKING:
    from pa_fast.throughput.harness import Table

RELATIVE = (0.0018, 0.017, 0.044, 0.14, 0.23)
"""‖I − B‖ / ‖B‖: a DPO stage, Qwen2.5-7B, Llama-3.1-8B, Llama-3.2-3B, Gemma-2-9B."""


@dataclass(frozen=True)
class Throughput:
    """Everything of one run.

    Attributes:
        machine, torch: where.
        weights, tensors: of the synthetic pairs.
        ceilings: what the machine can do at all.
        pairs: switches with every store, by ‖I − B‖ / ‖B‖ of the pair.
        encode_s: seconds that packed encoding took, checks of both endpoints included, by the same.
    """

    machine: str
    torch: str
    weights: int
    tensors: int
    ceilings: Table
    pairs: Mapping[float, Table]
    encode_s: Mapping[float, float]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A JSON object for each way, ceilings first.

        `seconds` is the median of `rounds` runs, `bytes_per_weight` what is kept in all, the live
        copy included, `moved_bytes` what a run reads and writes.
        """
        return [
            {
                "what": way.name,
                "relative_delta": relative,
                "bytes_per_weight": way.bytes_per_weight,
                "moved_bytes": way.moved_bytes,
                "seconds": way.median_s,
                "rounds": len(way.seconds),
                "encode_s": self.encode_s.get(relative or 0) if way.name == "packed" else None,
                "gbps": way.gbps,
            }
            for relative, table in [(None, self.ceilings), *self.pairs.items()]
            for way in table.ways
        ]

    def to_json(self) -> str:
        """Return one JSON document with where it was measured, and `rows`."""
        where = {name: getattr(self, name) for name in ("machine", "torch", "weights", "tensors")}
        return json.dumps({**where, "rows": self.rows}, indent=1)


def measure(
    device: str = "auto",
    shape: str = "auto",
    rounds: int = 5,
    progress: Callable[[str], None] = lambda what: None,
) -> Throughput:
    """Time the machine's ceilings, and switches of synthetic bf16 weights of a model's shapes, each
    checked before it is timed.

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

    from pa_fast.live.memory import empty_live
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
    live = dict(zip(base, empty_live(list(base.values()), where)))
    progress("what the machine can do")
    most = ceilings(live, base, rounds)
    measured = {
        relative: switches(live, base, relative, rounds, generator, progress)
        for relative in RELATIVE
    }
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
        most,
        {relative: table for relative, (table, _) in measured.items()},
        {relative: encode_s for relative, (_, encode_s) in measured.items()},
    )
