"""How far a delta is from the difference that it stands for: error, energy and bytes, tensor by
tensor, as it is encoded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pa_kernels.cores import over_cores

from pa_fast.delta.entry import Entry, Source, Store, kind, nbytes
from pa_fast.delta.mixed import HOLDERS


@dataclass(frozen=True)
class TensorQuality:
    """One tensor of a delta; D = I − B is what it stands for, D′ = W(1) − B what it gives.

    Attributes:
        kind: of its entry: whole, index, bitmap, packed8, packed16 or factors.
        parameters, bytes: of the tensor; of its entry.
        norm: ‖D‖_F.
        relative_error: ‖D − D′‖_F / ‖D‖_F; 0 where nothing is lost, NaN where D = 0 and D′ is not,
            or D is not finite.
        energy: ‖D′‖_F² / ‖D‖_F²; 1 where nothing is lost. A cut keeps 1 − error² of it, rescaled
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
    """How a lossy model speaks at one λ, beside the exact merge.

    Attributes:
        lam: key of λ.
        kl: KL(exact ‖ lossy), nats per token.
        agreement: share of the tokens before which both expect the same one most.
    """

    lam: str
    kl: float
    agreement: float


@dataclass(frozen=True)
class OnText:
    """Divergences over the tokens of a text, cut into windows as perplexity cuts them; `sha256` is
    that of the file."""

    sha256: str
    tokens: int
    window: int
    stride: int
    points: tuple[Divergence, ...]


@dataclass(frozen=True)
class QualityReport:
    """What a delta loses and what it costs.

    Attributes:
        name, options: of the store; the latter are all of them, in one line.
        lossless: whether the delta's end is the instruct model.
        parameters, bytes, bytes_per_parameter: of the model's tensors that follow λ, and of the
            delta's entries, as in a file.
        relative_error, energy: of all tensors as one vector.
        mean_error, mean_energy: means over tensors, weighted by their parameters.
        tensors: one row for each live tensor.
        text: what it does to the model, where a text was given.
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

    def to_json(self) -> str:
        """One JSON document with the fields of this class; null for what is not finite."""
        return json.dumps(_nulled(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, document: str) -> QualityReport:
        """The report that `to_json` wrote; null becomes NaN."""
        said = json.loads(document)
        text, rows = (
            said.pop("text"),
            tuple(TensorQuality(**_filled(row)) for row in said.pop("tensors")),
        )
        if text is not None:
            text = OnText(
                **{
                    **text,
                    "points": tuple(Divergence(**_filled(point)) for point in text["points"]),
                }
            )
        return cls(**_filled(said), tensors=rows, text=text)


@dataclass(frozen=True)
class Sums:
    """‖D‖², ‖D − D′‖² and ‖D′‖², of differences in fp32, summed in fp64."""

    delta: float = 0.0
    lost: float = 0.0
    kept: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.delta + other.delta, self.lost + other.lost, self.kept + other.kept)

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.lost / self.delta) if self.delta else math.nan if self.lost else 0.0

    @property
    def energy(self) -> float:
        return self.kept / self.delta if self.delta else math.nan if self.kept else 1.0


class Measured:
    """A store that measures what it encodes: give it where a store is wanted, and ask for the
    report afterwards.

    Cost: one more read of the sources, and of a low-rank delta one merge.
    """

    def __init__(self, store: Store):
        self._store = store
        self._rows: list[tuple[TensorQuality, Sums]] = []

    def __getattr__(self, name: str) -> Any:
        """Name, promises and options are those of the store."""
        return getattr(self.__dict__["_store"], name)

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entries of the store, each measured on its way."""
        self._rows = []
        for source, entry in zip(sources, self._store.encode(sources)):
            found = sums(source, entry)
            errors = found.relative_error, found.energy
            count = source.base.numel()
            row = TensorQuality(
                source.name, kind(entry), count, nbytes(entry), math.sqrt(found.delta), *errors
            )
            self._rows.append((row, found))
            yield entry

    def report(self) -> QualityReport:
        """The report of what was encoded last."""
        rows = tuple(row for row, _ in self._rows)
        parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
        all_ = sum((found for _, found in self._rows), Sums())

        def mean(values: Iterator[float]) -> float:
            return math.fsum(row.parameters * value for row, value in zip(rows, values)) / max(
                parameters, 1
            )

        return QualityReport(
            self._store.name,
            self._store.describe(),
            self._store.lossless,
            parameters,
            size,
            size / max(parameters, 1),
            all_.relative_error,
            all_.energy,
            mean(row.relative_error for row in rows),
            mean(row.energy for row in rows),
            rows,
        )


def report(store: Store, sources: Sequence[Source]) -> QualityReport:
    """What `store` makes of the sources, one entry at a time."""
    measured = Measured(store)
    for _ in measured.encode(sources):
        pass
    return measured.report()


def sums(source: Source, entry: Entry) -> Sums:
    """How the end that live weights reach with `entry` lies to the source's, span by span."""
    base, instruct = source.there()
    # never written: a dtype and a place
    live = torch.empty(source.base.shape, dtype=source.dtype, device=source.device)
    part = HOLDERS[type(entry)]([live], [base], [entry], [source.via])

    def over(span: slice) -> Sums:
        start, end = (side.float() for side in part.ends(0, span))
        delta, kept = instruct.view(-1)[span].float() - start, end - start
        return Sums(*(float(part.double().square().sum()) for part in (delta, delta - kept, kept)))

    run = over_cores if source.device.type == "cpu" else map
    return sum(run(over, part.spans(0)), Sums())


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulled(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in fields.items()}
