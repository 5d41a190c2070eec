"""Live weights of which some stay at base, while factors beside them follow λ in the forward
pass."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pa_kernels
import torch

from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import combine
from pa_fast.engines.attached import attach
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.memory import Memory
from pa_fast.rules import LambdaRule

if TYPE_CHECKING:
    from pa_fast.live.weights import LiveWeights

Pair = tuple[torch.Tensor, torch.Tensor]


class AttachedWeights:
    """The weights of a model with attached factors; implements `pa_fast.base.Weights`.

    Args:
        part: the live weights; those of attached layers hold base at every λ.
        lam: the scalar of the forward passes.
        factors: name → U, V, as attached.
    """

    def __init__(self, part: LiveWeights, lam: torch.Tensor, factors: Mapping[str, Pair]):
        self._part, self._lam, self._factors = part, lam, dict(factors)
        self._lock = threading.RLock()
        self._held: float | None = part.lam
        self._sum = self._factor_sum()
        # ‖UV‖² = trace(UᵀU · VVᵀ), without the product
        grams = [
            (u.double().T @ u.double(), v.double() @ v.double().T)
            for u, v in self._factors.values()
        ]
        self._norm = sum(float((left * right.T).sum()) for left, right in grams)
        self.store, self.exact, self.lossless = part.store, False, False

    rule = followed = None
    """The factors share one λ."""

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

    def intended_lambda(self) -> float:
        """λ itself; NaN where none is set."""
        return float("nan") if self._held is None else self._held

    def memory(self) -> Memory:
        """See `LiveWeights.memory`; factors lie where the model is."""
        size = sum(u.nbytes + v.nbytes for u, v in self._factors.values())
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
            for name, pair in self._factors.items()
            for side, part in zip("UV", pair)
        }
        return (
            combine(dict(zip(tensors, pa_kernels.checksum(list(tensors.values())))))
            if tensors
            else 0
        )


def attached(model: Any, part: LiveWeights) -> AttachedWeights:
    """Attach to `model` the factors that its live weights `part` have put apart."""
    return AttachedWeights(part, attach(model, part.apart), part.apart)
