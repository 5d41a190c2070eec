"""Low-rank deltas attached to a model: y = W_B x + λ U (V x), with λ a scalar in device memory.

Nothing is rewritten and no merged copy exists, so a switch is one store of 4 bytes. What cannot be
attached (norms, biases, fused experts) follows λ in the live weights, as in every store.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pa_kernels
import torch

from pa_fast.base import Lambda
from pa_fast.checkpoint.provenance import combine
from pa_fast.errors import EngineError, UsageError, WeightsError
from pa_fast.live.memory import Memory
from pa_fast.rules import LambdaRule
from pa_fast.stores.lora import layers

if TYPE_CHECKING:
    from pa_fast.live.weights import LiveWeights

AttachedFactors = tuple[torch.Tensor, torch.Tensor]
"""U and V of one weight, as its layer holds them."""


class _Beside(torch.nn.Module):
    """A layer with U, V and λ as buffers that no checkpoint holds."""

    u: torch.Tensor
    v: torch.Tensor
    lam: torch.Tensor
    follows_lambda = ("lam",)

    def hold(self, u: torch.Tensor, v: torch.Tensor, lam: torch.Tensor) -> None:
        for name, tensor in (("u", u), ("v", v), ("lam", lam)):
            self.register_buffer(name, tensor, persistent=False)

    def scaled(self, inner: torch.Tensor) -> torch.Tensor:
        """Return λ times `inner`, in its dtype."""
        return (inner.float() * self.lam).to(inner.dtype)


class AttachedLinear(_Beside, torch.nn.Linear):
    """A linear layer with the weight [M, N] of `linear`, and beside it U [M, R] and V [R, N] scaled
    by λ.

    Numerics: λ scales the R numbers between the factors, in fp32; a bf16 λ would be off by up to
    0.4 %.
    """

    def __init__(
        self, linear: torch.nn.Linear, u: torch.Tensor, v: torch.Tensor, lam: torch.Tensor
    ):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.hold(u, v, lam)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scaled = self.scaled(torch.nn.functional.linear(input, self.v))
        return torch.nn.functional.linear(
            input, self.weight, self.bias
        ) + torch.nn.functional.linear(scaled, self.u)


class AttachedEmbedding(_Beside, torch.nn.Embedding):
    """An embedding with the rows of `embedding`, and beside them those of U [M, R] times V [R, N],
    scaled by λ."""

    def __init__(
        self, embedding: torch.nn.Embedding, u: torch.Tensor, v: torch.Tensor, lam: torch.Tensor
    ):
        torch.nn.Module.__init__(self)
        vars(self).update(
            {key: value for key, value in vars(embedding).items() if not key.startswith("_")}
        )
        self.weight = embedding.weight
        self.hold(u, v, lam)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scaled = self.scaled(torch.nn.functional.embedding(input, self.u))
        return super().forward(input) + scaled @ self.v


def attachable(model: torch.nn.Module) -> dict[str, list[str]]:
    """Return the names of weights that `attach` can serve → the paths of the modules that use each,
    two where a head is tied.

    These are layers that use their weight in their own forward pass alone. Subclasses may differ.
    """
    paths: dict[str, list[str]] = {}
    for layer in layers(model).values():
        paths.setdefault(layer.weight, []).append(layer.path)
    return paths


def attach(model: torch.nn.Module, factors: Mapping[str, AttachedFactors]) -> torch.Tensor:
    """Replace the layers that use the weights named in `factors` by ones that hold the factors.

    Args:
        model: its weights hold the base model, and are left where they are.
        factors: name → U [M, R], V [R, N] on the weight's device, in its dtype.

    Returns:
        λ: fp32 scalar on the model's device, 0 at first, read by every forward pass; a CUDA graph
        reads it at each replay.

    Cost: R (M + N) numbers per layer; a forward pass costs R (M + N) multiplications more per token
    and layer.

    Raises:
        EngineError: a weight that is not of a linear or embedding layer alone.
    """
    known = attachable(model)
    device = next(model.parameters()).device
    lam = torch.zeros((), dtype=torch.float32, device=device)
    for name, (u, v) in factors.items():
        if name not in known:
            raise EngineError(
                f"nothing can be attached to `{name}`: it is no linear or embedding layer's own"
                " weight",
                "merge it",
            )
        for path in known[name]:
            owner, _, leaf = path.rpartition(".")
            layer: Any = model.get_submodule(path)
            kind: Any = AttachedLinear if type(layer) is torch.nn.Linear else AttachedEmbedding
            setattr(model.get_submodule(owner), leaf, kind(layer, u, v, lam))
    return lam


# --- attached weights


class AttachedWeights:
    """The weights of a model with attached factors: some stay at base, and factors beside them
    follow λ in the forward pass. Implements `pa_fast.base.Weights`.

    Args:
        part: the live weights; those of attached layers hold base at every λ.
        lam: the scalar of the forward passes.
        factors: name → U, V, as attached.
    """

    def __init__(
        self, part: LiveWeights, lam: torch.Tensor, factors: Mapping[str, AttachedFactors]
    ):
        self._part, self._lam, self._factors = part, lam, dict(factors)
        self._lock = threading.RLock()
        self._held: float | None = part.lam
        self._sum = self._factor_sum()
        # ‖UV‖² = trace(UᵀU · VVᵀ), without the product
        grams = [
            (u.double().T @ u.double(), v.double() @ v.double().T)
            for u, v in self._factors.values()
        ]
        self._norm = sum(float((uu * vv.T).sum()) for uu, vv in grams)
        self.store, self.exact, self.lossless = part.store, False, False

    rule = followed = None
    """None: the factors share one λ."""

    @property
    def lam(self) -> float | None:
        """The λ that the model computes with, or None after a switch that did not finish."""
        return self._held

    def set_lambda(self, lam: float) -> None:
        """Store λ where the forward passes read it, and write W(λ) into the tensors without
        attached factors."""
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
        """Return one checksum of the live weights, λ and the factors."""
        with self._lock:
            return self._combined(self._part.checksum())

    def read_back(self, merge_again: bool = False) -> int:
        """Return `checksum()`, after live weights, λ and factors were compared with what was set;
        see `LiveWeights.read_back`."""
        with self._lock:
            total = self._part.read_back(merge_again)
            self._check_foreign()
            return self._combined(total)

    def _combined(self, weights: int) -> int:
        lam, factors = pa_kernels.checksum([self._lam])[0], self._factor_sum()
        return combine({"weights": weights, "λ": lam, "factors": factors})

    def verify(self) -> bool:
        """Compare live weights, λ and factors with what they should be; see
        `LiveWeights.verify`."""
        with self._lock:
            self._part.verify()
            self._check_foreign()
        return True

    def _check_foreign(self) -> None:
        for what in self._foreign():
            raise WeightsError(
                f"{what} is not what was set", "something else wrote to it; load the model again"
            )

    def changed(self) -> list[str]:
        """Return the names of live tensors that are not what they should be, and `the attached λ`
        and `the attached factors` where these are not."""
        with self._lock:
            return self._part.changed() + self._foreign()

    def effective_lambda(self) -> float:
        """See `LiveWeights.effective_lambda`; what is attached follows λ without rounding."""
        moved, distance = self._part.projection()
        moved, distance = moved + float(self._lam) * self._norm, distance + self._norm
        return moved / distance if distance else float("nan")

    def intended_lambda(self) -> float:
        """Return λ; NaN where none is set."""
        return float("nan") if self._held is None else self._held

    def memory(self) -> Memory:
        """See `LiveWeights.memory`; factors lie where the model is."""
        size = sum(u.nbytes + v.nbytes for u, v in self._factors.values())
        known = self._part.memory()
        where = "host_bytes" if self._lam.device.type == "cpu" else "device_bytes"
        return replace(known, **{where: getattr(known, where) + size})

    def close(self) -> None:
        """Release the sources; the model keeps the λ it has."""
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
    """Attach to `model` the factors in `part.apart`, and return its weights."""
    return AttachedWeights(part, attach(model, part.apart), part.apart)
