"""Calls to the ranks of one `sglang.Engine`."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from pa_fast.engines.served.weights import Workers
from pa_fast.engines.sglang.worker import LOADER
from pa_fast.errors import EngineError, first_line
from pa_fast.foreign import one_line

_AGAIN = "what its ranks hold is not known: start the engine again"


class UpdateWorkers(Workers):
    """Ranks of SGLang, by its weight updates: the one call of `sglang.Engine` that runs a function
    of ours in every rank. No weight is sent; see `worker.apply` for the way back.

    `collective_rpc` of SGLang calls methods of its scheduler alone, and returns nothing.

    Args:
        llm: a `sglang.Engine` with `LOADER` among its `custom_weight_loader`.
        world: the number of its ranks, all of them on this host.
        dtype: that its model computes in, such as `bfloat16`.
    """

    engine = "SGLang"

    def __init__(self, llm: Any, world: int, dtype: str):
        self._llm, self._world, self._dtype = llm, world, dtype
        self._folder = tempfile.TemporaryDirectory(prefix="pa_fast-sglang-")
        self._numbers = itertools.count()

    def answers(self, method: str, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
        """See `Workers.answers`.

        Raises:
            EngineError: SGLang does not take the update, or a rank left no answer.
        """
        # a name of its own for each call: no answer of an earlier one is taken for it
        start = Path(self._folder.name) / f"{next(self._numbers)}-"
        call = {"method": method, "arguments": arguments, "dtype": self._dtype}
        self._update(json.dumps({**call, "answers": str(start)}))
        return [self._answer(Path(f"{start}{rank}.json"), rank) for rank in range(self._world)]

    def _update(self, text: str) -> None:
        import torch

        try:
            _taken("begin_weight_update", self._llm.begin_weight_update())
            try:
                # an empty tensor has no storage to share between processes
                update = self._llm.update_weights_from_tensor(
                    [(text, torch.empty(0))], load_format=LOADER, flush_cache=False
                )
            finally:
                ended = self._llm.end_weight_update()
            _taken("update_weights_from_tensor", update)
            _taken("end_weight_update", ended)
        except EngineError:
            raise
        except Exception as error:  # SGLang's own, of many kinds
            raise EngineError(
                f"a call to SGLang's ranks failed: {type(error).__name__}: {first_line(error)}",
                _AGAIN,
            ) from error

    def _answer(self, path: Path, rank: int) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        except (OSError, ValueError) as error:
            raise EngineError(
                f"rank {rank} of SGLang left no answer: {first_line(error)}", _AGAIN
            ) from error
        return answer


def _taken(call: str, outcome: tuple[bool, str]) -> None:
    """Raise EngineError where SGLang says that a call failed."""
    success, message = outcome
    if not success:
        raise EngineError(f"SGLang refuses {call}: {one_line(message, 500)}", _AGAIN)
