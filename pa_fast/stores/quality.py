"""Quality of a delta: error, energy and bytes, compared with the difference that it approximates,
tensor by tensor, as it is encoded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pa_kernels.cores import over_cores

from pa_fast.stores import registry
from pa_fast.stores.store import Entry, Source, Store, tapped


@dataclass(frozen=True)
class TensorQuality:
    """Quality of one tensor of a delta, where D = I − B is the exact difference and D′ = W(1) − B
    that of the delta.

    Attributes:
        kind: of its entry: whole, index, bitmap, packed8, packed16 or factors.
        parameters, bytes: of the tensor; of its entry.
        norm: ‖D‖_F.
        relative_error: ‖D − D′‖_F / ‖D‖_F; 0 if nothing is lost, NaN if D = 0 and D′ ≠ 0, or D is
            not finite.
        energy: ‖D′‖_F² / ‖D‖_F²; 1 if nothing is lost. A cut keeps 1 − error² of it; rescaled
            weights have more than D.
    """

    name: str
    kind: str
    parameters: int
    bytes: int
    norm: float
    relative_error: float
    energy: float


@dataclass(frozen=True)
class Divergence:
    """Divergence of a lossy model from the exact merge at one λ.

    Attributes:
        lam: key of λ.
        kl: KL(exact ‖ lossy), nats per token.
        agreement: share of the tokens for which both models have the same most likely token.
    """

    lam: str
    kl: float
    agreement: float


@dataclass(frozen=True)
class OnText:
    """Divergences over the tokens of a text, cut into windows as for perplexity; `sha256` is that
    of the file."""

    sha256: str
    tokens: int
    window: int
    stride: int
    points: tuple[Divergence, ...]


@dataclass(frozen=True)
class QualityReport:
    """Loss and cost of a delta.

    Attributes:
        name, options: of the store; all options, in one line.
        lossless: whether the delta's endpoint W(1) is the instruct model.
        parameters, bytes, bytes_per_parameter: of the model's tensors that follow λ, and of the
            delta's entries, as in a file.
        relative_error, energy: of all tensors as one vector.
        mean_error, mean_energy: means over tensors, weighted by their parameters.
        tensors: one row for each live tensor.
        text: divergence of the model from the exact merge, if a text was given.
        dense_bytes: bytes of the same entries in the format `dense`; None in reports of earlier
            versions.
    """

    name: str
    options: str
    lossless: bool
    parameters: int
    bytes: int
    bytes_per_parameter: float
    relative_error: float
    energy: float
    mean_error: float
    mean_energy: float
    tensors: tuple[TensorQuality, ...]
    text: OnText | None = None
    dense_bytes: int | None = None

    def to_json(self) -> str:
        """Return the fields of this class as one JSON document; null for values that are not
        finite."""
        return json.dumps(_nulled(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, document: str) -> QualityReport:
        """Return the report that `to_json` wrote; null becomes NaN."""
        fields = json.loads(document)
        rows = tuple(TensorQuality(**_filled(row)) for row in fields.pop("tensors"))
        text = fields.pop("text")
        if text is not None:
            points = tuple(Divergence(**_filled(point)) for point in text.pop("points"))
            text = OnText(**text, points=points)
        return cls(**_filled(fields), tensors=rows, text=text)


@dataclass(frozen=True)
class QualitySums:
    """‖D‖², ‖D − D′‖² and ‖D′‖², of differences in fp32, summed in fp64."""

    delta: float = 0.0
    lost: float = 0.0
    kept: float = 0.0

    def __add__(self, other: QualitySums) -> QualitySums:
        return QualitySums(self.delta + other.delta, self.lost + other.lost, self.kept + other.kept)

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.lost / self.delta) if self.delta else math.nan if self.lost else 0.0

    @property
    def energy(self) -> float:
        return self.kept / self.delta if self.delta else math.nan if self.kept else 1.0


class QualityMeter:
    """Measurement of the entries that a store encodes: use the attribute `store` in its place, then
    call `report`.

    Cost: one more read of the sources, and of a low-rank delta one merge.
    """

    def __init__(self, store: Store):
        self.store = tapped(store, self._measure)
        self._rows: dict[str, tuple[TensorQuality, QualitySums]] = {}
        self._dense: dict[str, int] = {}

    def _measure(self, source: Source, entry: Entry) -> Entry:
        total, owner, count = (
            quality_sums(source, entry),
            registry.owner(entry),
            source.base.numel(),
        )
        kind, size = owner.kind(entry), owner.nbytes(entry)
        errors = math.sqrt(total.delta), total.relative_error, total.energy
        row = TensorQuality(source.name, kind, count, size, *errors)
        self._rows[source.name] = row, total
        self._dense[source.name] = source.instruct.nbytes
        return entry

    def report(self) -> QualityReport:
        """Return the report of the last encoding."""
        rows = tuple(row for row, _ in self._rows.values())
        parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
        total = sum((part for _, part in self._rows.values()), QualitySums())

        def mean(values: Iterator[float]) -> float:
            weighted = (row.parameters * value for row, value in zip(rows, values))
            return math.fsum(weighted) / max(parameters, 1)

        return QualityReport(
            self.store.name,
            self.store.describe(),
            self.store.lossless,
            parameters,
            size,
            size / max(parameters, 1),
            total.relative_error,
            total.energy,
            mean(row.relative_error for row in rows),
            mean(row.energy for row in rows),
            rows,
            dense_bytes=sum(self._dense.values()),
        )


def report(store: Store, sources: Sequence[Source]) -> QualityReport:
    """Return the report of `store` on the sources, one entry at a time."""
    measured = QualityMeter(store)
    for _ in measured.store.encode(sources):
        pass
    return measured.report()


def quality_sums(source: Source, entry: Entry) -> QualitySums:
    """Compare the endpoint that live weights reach with `entry` with the source's, span by span."""
    base, instruct = source.on_device()
    # never written: it gives the dtype and the device
    live = torch.empty(source.base.shape, dtype=source.dtype, device=source.device)
    store = registry.owner(entry)()
    store.bind([live], [base], [entry], [source.intermediate_dtype])

    def span_sums(span: slice) -> QualitySums:
        start, end = (side.float() for side in store.endpoints(0, span))
        delta, kept = instruct.view(-1)[span].float() - start, end - start
        return QualitySums(
            *(float(part.double().square().sum()) for part in (delta, delta - kept, kept))
        )

    run = over_cores if source.device.type == "cpu" else map
    return sum(run(span_sums, store.spans(0)), QualitySums())


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulled(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in fields.items()}
