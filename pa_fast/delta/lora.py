"""How the peft library names and turns the factors of a delta, layer by layer.

    linear      LAYER.lora_A.weight [R, N] = V      LAYER.lora_B.weight [M, R] = U
    embedding   LAYER.lora_embedding_A [R, M] = Uᵀ  LAYER.lora_embedding_B [N, R] = Vᵀ

before which stands `base_model.model.`.

All beside a weight [M, N]. Every layer has factors of its own: a tied weight has them twice.

Source: https://github.com/huggingface/peft, src/peft/tuners/lora/layer.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pa_fast.delta.entry import Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """A layer that can be adapted.

    Attributes:
        path: of the module in the model.
        weight: the first name of its weight, which other layers may share.
        shape: [M, N] of that weight.
        embedding: whether it looks rows up; else it is linear.
    """

    path: str
    weight: str
    shape: tuple[int, int]
    embedding: bool

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in the weight file."""
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if self.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        return f"{PREFIX}{self.path}.{a}", f"{PREFIX}{self.path}.{b}"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B."""
        height, width = self.shape
        return (
            ((rank, height), (width, rank)) if self.embedding else ((rank, width), (height, rank))
        )

    def adapter(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B; possibly the factors themselves."""
        u, v = factors.u, factors.v
        return (u.T.contiguous(), v.T.contiguous()) if self.embedding else (v, u)

    def factors(self, a: torch.Tensor, b: torch.Tensor) -> Factors:
        """The factors; possibly A and B themselves."""
        return Factors(a.T.contiguous(), b.T.contiguous()) if self.embedding else Factors(b, a)


def layers(model: torch.nn.Module) -> dict[str, Layer]:
    """The layers that can be adapted, by path: plain linear and embedding layers, all of whose
    weight's users are such.

    Args:
        model: may be on the meta device.
    """
    users: dict[int, list[str]] = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in weights.items():
        users.setdefault(id(parameter), []).append(name)
    found = {}
    for names in users.values():
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
        if all(name.endswith(".weight") and _plain(module) for name, module in modules.items()):
            height, width = weights[names[0]].shape
            for name, module in modules.items():
                path = name.removesuffix(".weight")
                found[path] = Layer(
                    path, names[0], (height, width), type(module) is torch.nn.Embedding
                )
    return found


def _plain(module: torch.nn.Module) -> bool:
    # subclasses may scale or gate what they return, and a delta of their weight is then no delta of
    # their output
    return type(module) is torch.nn.Linear or (
        type(module) is torch.nn.Embedding and module.max_norm is None
    )
