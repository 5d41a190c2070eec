"""Low-rank deltas attached to a model: y = W_B x + λ U (V x), with λ a scalar in device memory.

Nothing is rewritten and no merged copy exists, so a switch is one store of 4 bytes. What cannot be
attached (norms, biases, fused experts) follows λ in the live weights, as in every store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pa_fast.errors import EngineError
from pa_fast.stores.lora import layers

if TYPE_CHECKING:
    Factors = tuple[torch.Tensor, torch.Tensor]


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
        """λ times `inner`, in its dtype."""
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
    """Names of weights that `attach` can serve → the modules that use each: two where a head is
    tied.

    Only layers that use their weight in no other way than by their own forward pass: exact
    subclasses may differ.
    """
    found: dict[str, list[str]] = {}
    for layer in layers(model).values():
        found.setdefault(layer.weight, []).append(layer.path)
    return found


def attach(model: torch.nn.Module, factors: Mapping[str, Factors]) -> torch.Tensor:
    """Replace the layers that use the weights named in `factors` by ones with the factors beside
    them.

    Args:
        model: its weights hold the base model, and are left where they are.
        factors: name → U [M, R], V [R, N] on the weight's device, in its dtype.

    Returns:
        λ: fp32 scalar on the model's device, 0 at first, read by every forward pass; a CUDA graph
        sees what it holds when it is replayed.

    Cost: R (M + N) numbers per layer; a forward pass costs R (M + N) multiplications more per token
    and layer.

    Raises:
        EngineError: a weight that is used otherwise than by linear and embedding layers.
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
