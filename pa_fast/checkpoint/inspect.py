"""What a pair is, from its headers: the answer of `pa-fast inspect`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from pa_fast.checkpoint.config import Difference, tied
from pa_fast.checkpoint.header import FLOATS
from pa_fast.checkpoint.pairing import pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.source import resolve


@dataclass(frozen=True)
class SideReport:
    """One checkpoint: its folder, weight bytes, shards, tensors per dtype and quick fingerprint."""

    folder: str
    bytes: int
    shards: int
    dtypes: dict[str, int]
    quick_fingerprint: str


@dataclass(frozen=True)
class PairReport:
    """A pair that can be merged. `parameters` counts elements that follow λ; `live_dtypes` counts tensors by live dtype."""

    model_type: str
    tensors: int
    parameters: int
    tied: bool
    live_dtypes: dict[str, int]
    base: SideReport
    instruct: SideReport
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """One JSON document with the fields of this class."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)


def inspect(base_dir: str | Path, instruct_dir: str | Path, *, extra_rows: str = "instruct") -> PairReport:
    """Pair two checkpoints from headers, configurations and tokenizers, and report what they are.

    Cost: headers, JSON files and 4 KiB per tensor are read; torch is not imported unless the two config.json differ in
    a key that could change the model.

    Raises:
        CheckpointError: a folder is no readable checkpoint.
        PairError: the two are not one model.
    """
    with Checkpoint.open(resolve(base_dir)) as base, Checkpoint.open(resolve(instruct_dir)) as instruct:
        found = pair(base, instruct, extra_rows)
        infos = list(instruct.tensors.values())
        said = tied(instruct.config)
        return PairReport(
            model_type=str(instruct.config.get("model_type", "unknown")),
            tensors=len(infos),
            parameters=sum(info.count for info in infos if info.dtype in FLOATS),
            tied=said if said is not None else not any(info.name.endswith("lm_head.weight") for info in infos),
            live_dtypes=dict(Counter(info.dtype for info in infos)),
            base=_side(base),
            instruct=_side(instruct),
            differences=found.differences,
            notes=found.notes,
        )


def _side(checkpoint: Checkpoint) -> SideReport:
    infos = list(checkpoint.tensors.values())
    return SideReport(
        folder=str(checkpoint.folder),
        bytes=sum(info.nbytes for info in infos),
        shards=len({info.file for info in infos}),
        dtypes=dict(Counter(info.dtype for info in infos)),
        quick_fingerprint=checkpoint.quick_fingerprint(),
    )
