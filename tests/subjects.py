"""What the conformance table asks of live weights, wherever they are."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pa_kernels import reference


class Subject(abc.ABC):
    """Live weights of some kind, beside plain copies of the tensors that they must interpolate.

    Attributes:
        base, instruct: name → tensor on the CPU; `instruct` is the end of the delta that is held.
        ulps: how many units in the last place a live weight may be off.
        span: the λ that may be asked for.
    """

    base: Mapping[str, torch.Tensor]
    instruct: Mapping[str, torch.Tensor]
    ulps = 0
    span = (-0.5, 1.5)

    def expected(self, name: str, lam: float, dtype: torch.dtype) -> torch.Tensor:
        """What live tensor `name` must hold at λ."""
        return reference.lerp(self.base[name], self.instruct[name], lam, dtype)

    @abc.abstractmethod
    def set_lambda(self, lam: float) -> None: ...

    @abc.abstractmethod
    def bits(self) -> dict[str, torch.Tensor]:
        """Every live tensor, whole and on the CPU."""

    @abc.abstractmethod
    def pointers(self) -> dict[str, int]:
        """Where each live tensor, or each part of it, lies."""

    @abc.abstractmethod
    def versions(self) -> dict[str, int]:
        """How often each live tensor was written, as autograd counts."""

    @abc.abstractmethod
    def poke(self) -> str:
        """Write to one live tensor behind the weights' back; its name."""

    @abc.abstractmethod
    def checksum(self) -> int: ...

    @abc.abstractmethod
    def changed(self) -> list[str]: ...

    @abc.abstractmethod
    def verify(self) -> bool: ...

    @abc.abstractmethod
    def effective_lambda(self) -> float: ...

    @abc.abstractmethod
    def total_bytes(self) -> int: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of processes and memory."""


class Live(Subject):
    """A subject in this process: `weights`, and the tensors `live` that they write."""

    def __init__(
        self,
        weights: Any,
        set_lambda: Callable[[float], None],
        live: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor] = {},
        instruct: Mapping[str, torch.Tensor] = {},
    ):
        self.weights, self.live, self.base, self.instruct = weights, live, base, instruct
        self._set_lambda = set_lambda

    def set_lambda(self, lam: float) -> None:
        self._set_lambda(lam)

    def bits(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.live.items()}

    def pointers(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.live.items()}

    def versions(self) -> dict[str, int]:
        return {name: tensor._version for name, tensor in self.live.items()}

    def poke(self, name: str | None = None) -> str:
        name = next(iter(self.live)) if name is None else name
        with torch.no_grad():
            self.live[name].view(-1)[0] += 1
        return name

    def checksum(self) -> int:
        return int(self.weights.checksum())

    def changed(self) -> list[str]:
        return list(self.weights.changed())

    def verify(self) -> bool:
        return bool(self.weights.verify())

    def effective_lambda(self) -> float:
        return float(self.weights.effective_lambda())

    def total_bytes(self) -> int:
        return int(self.weights.memory().total_bytes)

    def close(self) -> None:
        self.weights.close()

    def __repr__(self) -> str:
        return repr(self.weights)


class Product(Live):
    """A subject some of whose deltas are products UV: `factors` has them by name."""

    ulps = 1

    def __init__(self, *args: Any, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(*args)
        self.factors = factors

    def expected(self, name: str, lam: float, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.factors:
            return super().expected(name, lam, dtype)
        return reference.lowrank(self.base[name], *self.factors[name], lam, dtype)
