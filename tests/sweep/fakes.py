"""An engine of two small tensors in plain Python, and evaluators that say what they did."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pa_fast.base import Engine, Item, Score

BASE = {"embed.weight": [1.0, 2.0, 3.0], "head.weight": [-1.0, 0.5]}
INSTRUCT = {"embed.weight": [2.0, 1.0, 3.5], "head.weight": [-2.0, 1.5]}


class FakeWeights:
    """B + λ (I − B) over `BASE` and `INSTRUCT`. `failing` holds λ at which `set_lambda` raises,
    `unproven` those at which `verify` says no."""

    def __init__(self, instruct: Mapping[str, list[float]] = INSTRUCT):
        self.lam: float | None = None
        self.live: dict[str, list[float]] = {}
        self.instruct = instruct
        self.switches: list[float] = []
        self.failing: set[float] = set()
        self.unproven: set[float] = set()
        self.set_lambda(0.0)
        self.switches.clear()

    def merged(self) -> dict[str, list[float]]:
        assert self.lam is not None
        return {
            name: [b + self.lam * (i - b) for b, i in zip(BASE[name], self.instruct[name])]
            for name in BASE
        }

    def set_lambda(self, lam: float) -> None:
        self.switches.append(float(lam))
        if float(lam) in self.failing:
            raise RuntimeError("the device is gone")
        self.lam = float(lam)
        self.live = self.merged()

    def checksum(self) -> int:
        return (
            zlib.crc32(
                b"".join(struct.pack("<d", v) for values in self.live.values() for v in values)
            )
            << 32
            | 7
        )

    def verify(self) -> bool:
        return self.lam not in self.unproven and self.live == self.merged()

    def changed(self) -> list[str]:
        return [name for name, values in self.merged().items() if values != self.live[name]]

    def effective_lambda(self) -> float:
        assert self.lam is not None
        return self.lam * (1 - 1e-9) + 1 / 3e4

    def memory(self) -> Any:
        return None


class FakeEngine:
    """What the driver needs of an engine. `stale` holds λ at which it cannot prove that no old
    state is left."""

    def __init__(
        self,
        identity: Mapping[str, Any] | None = None,
        instruct: Mapping[str, list[float]] = INSTRUCT,
    ):
        self.weights = FakeWeights(instruct)
        self.tokenizer: Any = None
        self.identity = dict(
            identity
            or {"base": "b0", "instruct": "i0", "options": {"dtype": "bf16", "stop": [1, 2]}}
        )
        self.stale: set[float] = set()

    def loglikelihood(self, pairs: Sequence[Any]) -> list[Any]:
        raise AssertionError("the driver does not score")

    def generate(self, prompts: Sequence[Any], config: Any) -> list[Any]:
        raise AssertionError("the driver does not generate")

    def on_weights_changed(self) -> None:
        if self.weights.lam in self.stale:
            raise RuntimeError("the prefix cache could not be reset")


class Scorer:
    """Scores a function of λ, with items; `log`, where given, gets a line at the start of every
    evaluation."""

    def __init__(
        self,
        name: str,
        unit: str = "accuracy",
        *,
        higher: bool = True,
        identity: Mapping[str, Any] | None = None,
        log: Path | None = None,
        pause_s: float = 0.0,
        act: Callable[[Engine], None] | None = None,
    ):
        self.name, self.unit, self.higher_is_better = name, unit, higher
        self.identity = dict(identity or {"data": "d0"})
        self.calls: list[float] = []
        self.act = act
        self._log, self._pause_s = log, pause_s

    def __call__(self, engine: Engine) -> Score:
        lam = engine.weights.lam
        assert lam is not None
        self.calls.append(lam)
        if self._log is not None:
            handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{lam!r} {self.name}\n".encode())
            os.close(handle)
        time.sleep(self._pause_s)
        if self.act is not None:
            self.act(engine)
        items = [Item(f"q{n}", "task", (lam * 7 + n * len(self.name)) % 1) for n in range(4)]
        return Score(sum(item.score for item in items) / 4, self.unit, 4, items)
