"""Live weights of which some stay at base, while factors beside them follow λ in the forward
pass."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pa_kernels
import torch
from pa_kernels import SparseTensor

from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import combine
from pa_fast.delta.entry import Entry, Factors, Source, Store
from pa_fast.engines.attached import attach, attachable
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.memory import Memory
from pa_fast.rules import LambdaRule

if TYPE_CHECKING:
    from pa_fast.live.weights import LiveWeights


class Diverted:
    """A store whose factors of the weights in `served` are put aside; those weights are left at
    base.

    Attributes:
        factors: name → what was put aside.
    """

    def __init__(self, inner: Store, served: Collection[str]):
        self._inner, self._served = inner, served
        self.factors: dict[str, Factors] = {}
        self.name, self.exact, self.lossless = inner.name, inner.exact, inner.lossless

    def describe(self) -> str:
        return self._inner.describe()

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        for source, entry in zip(sources, self._inner.encode(sources)):
            yield self.put_aside(source.name, source.base, entry)

    def put_aside(self, name: str, base: torch.Tensor, entry: Entry) -> Entry:
        """What the live tensor `name` follows λ by: `entry`, or nothing at all once its factors are
        aside."""
        if not isinstance(entry, Factors) or entry.u.ndim != 2 or name not in self._served:
            return entry
        self.factors[name] = entry
        none = base.reshape(-1)[:0]
        return SparseTensor.encode(
            torch.zeros(0, dtype=torch.int64, device=base.device), none, none, base.numel()
        )


class AttachedWeights:
    """The weights of a model with attached factors; implements `pa_fast.base.Weights`.

    Args:
        part: the live weights; those of attached layers hold base at every λ.
        lam: the scalar of the forward passes.
        factors: name → U, V, as attached.
    """

    def __init__(self, part: LiveWeights, lam: torch.Tensor, factors: Mapping[str, Factors]):
        self._part, self._lam, self._factors = part, lam, dict(factors)
        self._lock = threading.RLock()
        self._held: float | None = part.lam
        self._sum = self._factor_sum()
        # ‖UV‖² = trace(UᵀU · VVᵀ), without the product
        grams = [
            (f.u.double().T @ f.u.double(), f.v.double() @ f.v.double().T)
            for f in self._factors.values()
        ]
        self._norm = sum(float((left * right.T).sum()) for left, right in grams)
        self.store, self.exact, self.lossless = part.store, False, False

    rule = followed = None  # the factors share one λ

    @property
    def lam(self) -> float | None:
        """The λ that the model computes with, or None after a switch that did not finish."""
        return self._held

    def set_lambda(self, lam: float) -> None:
        """Store λ where the forward passes read it, and write W(λ) into what nothing is attached
        to."""
        if isinstance(lam, LambdaRule):
            raise UsageError(
                "a λ rule for attached factors, which share one λ", "use another store"
            )
        value = float(Lambda(lam))
        with self._lock:
            self._part.check_lambda(value)
            self._held = None
            self._part.set_lambda(value)
            with torch.no_grad():
                self._lam.fill_(value)
            self._held = value

    def check_lambda(self, lam: float) -> None:
        """See `LiveWeights.check_lambda`."""
        self._part.check_lambda(float(Lambda(lam)))

    def checksum(self) -> int:
        """The proof of switch: that of the live weights, of λ and of the factors."""
        with self._lock:
            return combine(
                {
                    "weights": self._part.checksum(),
                    "λ": pa_kernels.checksum([self._lam])[0],
                    "factors": self._factor_sum(),
                }
            )

    def verify(self) -> bool:
        """Compare live weights, λ and factors with what they should be; see
        `LiveWeights.verify`."""
        with self._lock:
            self._part.verify()
            wrong = self._foreign()
        if wrong:
            raise WeightsError(
                f"{wrong[0]} is not what was set",
                "something else wrote to it; load the model again",
            )
        return True

    def changed(self) -> list[str]:
        """Names of live tensors that are not what they should be, and `the attached λ`, `the
        attached factors`."""
        with self._lock:
            return self._part.changed() + self._foreign()

    def effective_lambda(self) -> float:
        """See `LiveWeights.effective_lambda`; what is attached follows λ without rounding."""
        moved, distance = self._part.projection()
        moved, distance = moved + float(self._lam) * self._norm, distance + self._norm
        return moved / distance if distance else float("nan")

    def memory(self) -> Memory:
        """See `LiveWeights.memory`; factors lie where the model is."""
        size = sum(f.u.nbytes + f.v.nbytes for f in self._factors.values())
        known = self._part.memory()
        where = "host_bytes" if self._lam.device.type == "cpu" else "device_bytes"
        return replace(known, **{where: getattr(known, where) + size})

    def close(self) -> None:
        """Let go of the sources; the model keeps the λ it has."""
        self._part.close()

    def __repr__(self) -> str:
        return f"<AttachedWeights, {len(self._factors)} with factors: {self._part!r}>"

    def _foreign(self) -> list[str]:
        if self._held is None:
            raise WeightsError("no λ is set: the last switch did not finish", "call set_lambda")
        expected = torch.tensor(self._held, dtype=torch.float32)
        wrong = [] if torch.equal(self._lam.cpu(), expected) else ["the attached λ"]
        return wrong if self._factor_sum() == self._sum else [*wrong, "the attached factors"]

    def _factor_sum(self) -> int:
        tensors = {
            f"{name} {side}": part
            for name, f in self._factors.items()
            for side, part in (("U", f.u), ("V", f.v))
        }
        return (
            combine(dict(zip(tensors, pa_kernels.checksum(list(tensors.values())))))
            if tensors
            else 0
        )


def attached(model: Any, part: LiveWeights, factors: Mapping[str, Factors]) -> AttachedWeights:
    """Attach `factors` to `model`, whose live weights are `part`."""
    lam = attach(model, {name: (f.u, f.v) for name, f in factors.items()})
    return AttachedWeights(part, lam, factors)


def divertible(inner: Store, model: torch.nn.Module) -> Diverted:
    """`inner`, with the factors of every weight of `model` that `attach` can serve put aside."""
    return Diverted(inner, attachable(model).keys())
